"""Whole models for ``sora-fast predict --model``: what their layers launch, each kernel's predicted time and its floor.

The module itself runs on fake tensors, which have sizes and no memory. Triton kernels are recorded with tensors of the
device "meta" and predicted one by one. What PyTorch computes itself, GEMMs of linear layers above all, stands at its floor:
nothing here knows cuBLAS.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from ..cyclemodel import GPU, predict
from ..cyclemodel.model import PEAK
from ..dispatch import use_backend, use_emulated_gpu
from ..testing import aot
from .predict_kernels import MEMORY, Work, tensor_bytes

_attention = torch.ops.aten._scaled_dot_product_flash_attention
FLOPS = {**flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_attention]}


@dataclass
class Layer:
    """Launches of one kernel with one tile, or calls of one operator of PyTorch, all together."""

    kernel: str
    tile: str
    binds: str  # "FLOPs", "bytes"
    count: int = 0
    amount: float = 0.0  # of what binds
    floor_ms: float = 0.0
    predicted_ms: float | None = None  # None: not predicted, counted at its floor

    @property
    def ms(self) -> float:
        return self.floor_ms if self.predicted_ms is None else self.predicted_ms


@dataclass
class _Trace(TorchDispatchMode):
    """Launches of our kernels, and (operator, FLOPs, bytes) of what PyTorch computes itself."""

    launches: list[aot.Launch] = field(default_factory=list)
    others: list[tuple[str, float, int]] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, operator, types, given=(), named=None):
        named = named or {}
        made = operator(*given, **named)
        tensors = [each for each in tree_leaves((given, named)) if isinstance(each, torch.Tensor)]
        outputs = [each for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        if operator.namespace == "sora_fast":
            with unset_fake_temporarily():
                bare = tree_map_only(torch.Tensor, _bare, (given, named))
                run = lambda: operator._op_dk(torch._C.DispatchKey.CPU, *bare[0], **bare[1])
                self.launches += aot.launches(run)
        elif operator._overloadpacket in FLOPS:
            flops = FLOPS[operator._overloadpacket](*given, **named, out_val=made)
            self.others.append((operator._overloadpacket.__name__, flops, 0))
        else:
            inputs = {each.untyped_storage()._cdata for each in tensors}
            fresh = [each for each in outputs if each.untyped_storage()._cdata not in inputs]
            if fresh and tensors and "empty" not in operator._overloadpacket.__name__:  # no view, no memory alone
                nbytes = sum(each.numel() * each.element_size() for each in (*tensors, *fresh))
                self.others.append((operator._overloadpacket.__name__, 0, nbytes))
        return made


def _bare(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@contextmanager
def _fake_gpu(arch: str) -> Iterator[None]:
    """Ops take the backend "triton" for CPU tensors, with the configs of ``arch``."""
    with use_emulated_gpu(SimpleNamespace(arch=arch)), use_backend("triton"):
        yield


def trace(run: Callable[[], object], arch: str) -> _Trace:
    """What ``run`` launches and computes on a GPU of ``arch``; it makes its own tensors, bfloat16 where it says nothing."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _fake_gpu(arch), _Trace() as found:
            run()
    finally:
        torch.set_default_dtype(usual)
    return found


# -------------------------------------------------------------------------------------------------------------- models
def wan_vae() -> None:
    """Wan 2.1's VAE decodes 81 frames of 480 x 832 in bfloat16, all at once."""
    from ..models import VideoVAE

    vae = VideoVAE.preset("wan2.1")
    with torch.no_grad():
        vae.decode(torch.empty(1, 16, 21, 60, 104))


def wan_block() -> None:
    """A block of Wan 14B, forward and backward, in bfloat16: the 32,760 tokens of 81 frames of 480 x 832, 512 of text."""
    from ..models.wan import PRESETS, WanBlock
    from ..nn import Residual
    from ..pack import Pack

    config = PRESETS["14B"]
    with unset_fake_temporarily():
        pack = Pack([(21, 30, 52)], text_lengths=(512,))
    draw = lambda *shape, **kind: torch.empty(shape, **kind).requires_grad_()
    stream, modulation = draw(pack.num_tokens, config.width), draw(1, 6, config.width, dtype=torch.float32)
    out = WanBlock(config)(Residual(stream), modulation, pack, draw(512, config.width))
    (out.x.float().sum() + out.y.float().sum() + out.gate.sum()).backward()


MODELS = {"wan-vae": wan_vae, "wan-block": wan_block}


# ----------------------------------------------------------------------------------------------------------- the times
def _flops(kernel: str, constants, tensors: dict) -> float:
    """Of one launch with matrix products whose time is not memory's; attention of one sample, without a mask."""
    value = constants.get
    if "E0" in constants:
        (queries, heads, width), keys = tensors["q"].shape, tensors["k"].shape[0]
        return {"forward_kernel": 4, "dq_kernel": 6, "dkdv_kernel": 8}[kernel] * queries * keys * heads * width
    if "KT" in constants:
        taps = value("KT") * value("KH") * value("KW")
        pixels = tensors["out" if "MADE" in constants else "y" if kernel == "forward_kernel" else "dy"]
        channels = (value("MADE"), value("SUMMED")) if "MADE" in constants else (value("CIN"), value("COUT"))
        return 2 * pixels.numel() / pixels.shape[1] * taps * prod(channels)
    return 0.0


def layers(run: Callable[[], object], gpu: GPU, tell: Callable[[str], None] = lambda line: None) -> list[Layer]:
    """Of ``run``, those that take longest first; ``tell`` hears of kernels that cannot be predicted."""
    traced = trace(run, f"sm{gpu.cc}")
    peak = (PEAK if gpu.cc == 90 else 4 * 4096 / gpu.hmma) * gpu.sms * gpu.ghz * 1e9
    found: dict[object, Layer] = {}
    predictions = {}
    for launch in traced.launches:
        case = launch.case(launch.fn.__name__)
        family = launch.fn.__module__.rpartition(".")[2].partition("_")[0]
        key = launch.fn, *(str(sorted(each.items(), key=str)) for each in (case.constexprs, case.signature, case.options))
        nbytes = tensor_bytes(launch)
        if key not in predictions:
            try:
                predictions[key] = predict(Work(family, case, nbytes, lambda: None, 0).kernel(gpu), gpu)
            except ValueError as error:
                tell(f"{launch.fn.__name__}: at its floor. {error}")
                predictions[key] = None
        prediction = predictions[key]
        named = {**dict(zip(launch.fn.arg_names, launch.args, strict=False)), **launch.kwargs}
        flops = 0.0
        if family not in MEMORY and prediction and prediction.tflops:  # else its time is memory's
            flops = _flops(launch.fn.__name__, case.constexprs, named)
        layer = found.setdefault(key, Layer(f"{family} {launch.fn.__name__}", prediction.tile if prediction else "",
                                            "FLOPs" if flops else "bytes"))
        amount = flops or sum(nbytes.values())
        layer.count += 1
        layer.amount += amount
        layer.floor_ms += amount / (peak if flops else gpu.dram) * 1e3
        if prediction:
            rate = prediction.tflops * 1e12 if flops else prediction.copy_share * gpu.dram
            layer.predicted_ms = (layer.predicted_ms or 0.0) + amount / rate * 1e3
    for name, flops, nbytes in traced.others:
        layer = found.setdefault(name, Layer(f"PyTorch's {name}", "", "FLOPs" if flops else "bytes"))
        layer.count += 1
        layer.amount += flops or nbytes
        layer.floor_ms += (flops / peak + nbytes / gpu.dram) * 1e3
    return sorted(found.values(), key=lambda layer: -layer.ms)


def report(name: str, gpu: GPU, found: list[Layer]) -> Iterator[str]:
    """A line for the whole, and one for each layer that takes a thousandth of it."""
    ours = [layer for layer in found if layer.predicted_ms is not None]
    rest = sum(layer.floor_ms for layer in found if layer.predicted_ms is None)
    floor, whole = sum(layer.floor_ms for layer in ours), sum(layer.ms for layer in found)
    yield (f"{name} on {gpu.name}: predicted {whole:,.1f} ms; our kernels "
           f"{sum(layer.ms for layer in ours):,.1f} ms (floor {floor:,.1f} ms), PyTorch's own at its floor {rest:,.1f} ms")
    for layer in (layer for layer in found if layer.ms >= 1e-3 * whole):
        unit = "TFLOP" if layer.binds == "FLOPs" else "GB"
        amount = layer.amount / (1e12 if layer.binds == "FLOPs" else 1e9)
        floor = "at its floor" if layer.predicted_ms is None else f"floor {layer.floor_ms:,.2f} ms"
        yield (f"  {layer.ms:9,.2f} ms  {layer.count:4} x {' '.join((layer.kernel, layer.tile)).strip()}: {floor} "
               f"({amount:,.2f} {unit})")
