"""CudaTensor, and how an operator of PyTorch runs on it: on the CPU memory behind, once devices and waits are checked."""

import contextlib
from functools import partial

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import waits

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)


class CudaTensor(torch.Tensor):
    """A tensor that says it is on cuda:0; ``held`` is its CPU tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=DEVICE, requires_grad=False)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})

    def __repr__(self):
        return f"CudaTensor({self.held})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            made = self.detach().clone()
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if is_parameter else \
                made.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def tolist(self):
        waits.note("tolist")
        return self.held.tolist()

    def numpy(self, **_):
        raise TypeError(waits.here("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first"))

    def pin_memory(self, *_):
        raise RuntimeError(waits.here("cannot pin a tensor that is on cuda:0"))

    def record_stream(self, stream):
        pass


class Mode(TorchDispatchMode):
    """Makes CudaTensors of what is asked for on cuda:0."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if func in HOST:
            return HOST[func](args[0])
        if any(isinstance(x, CudaTensor) for x in pytree.tree_leaves((args, kwargs))) or (
                target is not None and torch.device(target).type == "cuda"):
            return execute(func, args, kwargs)
        return func(*args, **kwargs)


MODE = Mode()


def _pinned(x):
    made = x.clone()
    made.pinned = True  # of this tensor, and of no view of it
    return made


HOST = {aten.is_pinned.default: lambda x: hasattr(x, "pinned"), aten._pin_memory.default: _pinned}

# ------------------------------------------------------------------------------------------------------------ checks
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXING = (aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
            aten._index_put_impl_.default)
# Elsewhere PyTorch takes a CPU tensor of no dimension beside those on the device, but not here.
NOT_EVEN_SCALARS = ("cat", "stack", "index_select", "gather", "scatter", "scatter_add", "index_add", "index_add_", "mm",
                    "bmm", "addmm", "baddbmm", "convolution", "embedding", "native_layer_norm", "native_group_norm",
                    "_fused_rms_norm")
# Their results have a size that the device knows alone, or are values on the host.
WAITING = {aten._local_scalar_dense.default: "item", aten.nonzero.default: "nonzero", aten.equal.default: "equal",
           aten.masked_select.default: "masked_select", aten._unique2.default: "unique",
           aten.unique_dim.default: "unique", aten.unique_consecutive.default: "unique_consecutive",
           aten.bincount.default: "bincount"}


def _check_devices(func, args, tensors) -> None:
    if func in COPIES:
        return
    if func in INDEXING and isinstance(args[0], CudaTensor):  # its indices may be on the CPU
        tensors = [x for x in args[2:] if isinstance(x, torch.Tensor)]
    name = func._schema.name.partition("::")[2]
    for x in tensors:
        if not isinstance(x, CudaTensor) and (x.dim() or name in NOT_EVEN_SCALARS):
            raise RuntimeError(waits.here(f"Expected all tensors to be on the same device, got cuda:0 and {x.device} "
                                          f"{tuple(x.shape)} in {func}"))


def _check_waits(func, args, kwargs, on_cuda: bool) -> None:
    from_cuda = isinstance(args[0], CudaTensor) if args else False
    if func in WAITING and from_cuda:
        waits.note(WAITING[func])
    elif func is aten.repeat_interleave.Tensor and from_cuda and kwargs.get("output_size") is None:
        waits.note("repeat_interleave without output_size")
    elif func in INDEXING:
        indices = [x for x in args[1] if isinstance(x, torch.Tensor)]
        if any(isinstance(x, CudaTensor) and x.dtype in (torch.bool, torch.uint8) for x in indices):
            waits.note("indexing by a mask")
        elif from_cuda and not all(isinstance(x, CudaTensor) for x in indices):
            waits.note("indexing by a CPU tensor")
    elif func is aten._to_copy.default:
        _check_copy(args[0], from_cuda, on_cuda, kwargs.get("non_blocking", False))
    elif func is aten.copy_.default:
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        _check_copy(args[1], isinstance(args[1], CudaTensor), from_cuda, non_blocking)


def _check_copy(x, source: bool, target: bool, non_blocking: bool) -> None:
    """Of a copy of ``x`` from and to the device or the host. One to the host is read there: whoever does not wait, must."""
    if not x.numel():
        return
    if source and not target:
        waits.note("copy to the host")
    if target and not source:
        if non_blocking and not hasattr(x, "pinned"):  # of more than a few KB it waits for the stream
            waits.note("copy from memory that is not pinned")
        elif not non_blocking or waits.state.capture is not None:
            waits.note("copy from the host")


# --------------------------------------------------------------------------------------------------------- execution
WIDE = (aten.convolution.default, aten.convolution_backward.default, aten.mm.default, aten.bmm.default, aten.addmm.default,
        aten.baddbmm.default)


CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)


def tf32(x):
    """``x``, a tensor of float32 with the 10 bits of mantissa that cuDNN's convolutions keep by default."""
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def execute(func, args, kwargs):
    """``func`` as on cuda:0."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):  # in inference mode
        with MODE:
            return func.decompose(*args, **kwargs)
    if func is aten._fused_sdp_choice.default:
        return 0  # the composition that runs on every memory
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    any_here = any(isinstance(x, CudaTensor) for x in tensors)
    target = kwargs.get("device")
    on_cuda = any_here if target is None else torch.device(target).type == "cuda"
    if any_here:
        _check_devices(func, args, tensors)
    _check_waits(func, args, kwargs, on_cuda)

    tape = waits.state.capture
    run = partial(_kernel, func, args, kwargs) if func.namespace == "sora_fast" else _on_memory(func, flat, spec)
    if tape is None:
        out = run()
    else:
        out = tape.run(func, run, tensors, _written(func, args, kwargs))
    if waits.state.pool is not None and on_cuda:
        waits.state.pool.add(out, tensors)
    return _given_back(func, args, kwargs, out, on_cuda)


def _kernel(func, args, kwargs):
    """An operator of ours runs as it would on CUDA, on CudaTensors: its wrapper is host code to be looked at."""
    tape = waits.state.capture
    with MODE, contextlib.nullcontext() if tape is None else tape.one_step():
        out = func._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
    if not all(isinstance(x, CudaTensor) for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)):
        raise RuntimeError(waits.here(f"{func}: expected outputs on cuda:0, got some on the CPU"))
    return out


def _on_memory(func, flat, spec):
    """A call of ``func`` on the CPU memory behind the tensors."""
    def held(x):
        if isinstance(x, torch.device):
            return torch.device("cpu") if x.type == "cuda" else x
        return x.held if isinstance(x, CudaTensor) else x

    wide = func in WIDE and next((x.dtype for x in flat if isinstance(x, CudaTensor) and x.dtype in HALF), None)
    short = func in CONVOLUTIONS and torch.backends.cudnn.conv.fp32_precision == "tf32"
    args, kwargs = pytree.tree_unflatten([held(x) for x in flat], spec)

    def run():
        if short:
            return func(*pytree.tree_map(tf32, args), **kwargs)
        if not wide:
            return func(*args, **kwargs)
        cast = lambda values, dtype: pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) else x, values)
        # as cuBLAS and cuDNN: sums in float32, one rounding
        return cast(func(*cast(args, torch.float32), **cast(kwargs, torch.float32)), wide)

    return run


def _argument(func, args, kwargs, at: int):
    return args[at] if at < len(args) else kwargs.get(func._schema.arguments[at].name)


def _written(func, args, kwargs) -> list[torch.Tensor]:
    """The tensors that ``func`` writes into."""
    places = [at for at, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return [x for x in pytree.tree_leaves([_argument(func, args, kwargs, at) for at in places])
            if isinstance(x, torch.Tensor)]


def _given_back(func, args, kwargs, out, on_cuda: bool):
    """Results as CudaTensors; what was written into is given back itself."""
    returns = func._schema.returns
    several = isinstance(out, (tuple, list)) and len(returns) > 1
    results = []
    for each, told in zip(out if several else [out], returns, strict=False):
        if told.alias_info is not None and told.alias_info.is_write:
            results.append(next(
                _argument(func, args, kwargs, at) for at, a in enumerate(func._schema.arguments)
                if a.alias_info is not None and a.alias_info.before_set == told.alias_info.before_set))
        else:
            wrap = lambda x: CudaTensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor) else x
            results.append(pytree.tree_map(wrap, each) if on_cuda else each)
    if several:
        return tuple(results)
    return results[0] if results else None
