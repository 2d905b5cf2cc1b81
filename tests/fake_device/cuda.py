"""torch.cuda in terms of the fake device: ``install()``, for the rest of the process."""

import threading
import time
from types import SimpleNamespace

import torch
import torch._dynamo  # before install(): its tables name functions of torch.cuda, each once
import torch._functorch.config

from sora_fast.kernels.arch import REGISTERS, SHARED

from . import graphs, tensors, waits
from .tensors import DEVICE, CudaTensor

CAPABILITY, NAME, MEMORY = (9, 0), "NVIDIA H200", 141 * 2**30


class Event:
    """Recorded when it is told to: nothing is in flight here. Its times are the host's."""

    def __init__(self, **_):
        self.at = 0.0

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        waits.note("Event.synchronize")

    def wait(self, stream=None):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return max((other.at - self.at) * 1e3, 1e-3)


class Stream:
    cuda_stream, device = 0, DEVICE

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        event = event or Event()
        event.record()
        return event

    def synchronize(self):
        waits.note("Stream.synchronize")

    def query(self):
        return True


_streams = [Stream()]


class stream:
    """In the place of torch.cuda.stream; of None nothing."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        self.before = list(_streams)
        _streams.append(self.stream or _streams[-1])

    def __exit__(self, *_):
        _streams[:] = self.before


class _Capture(graphs.graph):
    def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        super().__init__(cuda_graph)
        self.on = stream

    def __enter__(self):
        super().__enter__()
        _streams.append(self.on or Stream())  # as PyTorch: never the default stream

    def __exit__(self, kind, *told):
        if kind is None:  # as PyTorch: one that fails leaves its stream the current one
            _streams.pop()
        super().__exit__(kind, *told)


class device:
    """In the place of torch.cuda.device."""

    def __init__(self, device):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


# Few SMs, as the emulator has: a persistent kernel goes round its loop on small inputs.
PROPERTIES = SimpleNamespace(
    name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=3, total_memory=MEMORY,
    L2_cache_size=60 * 2**20, warp_size=32, uuid="00000000-0000-0000-0000-000000000000", gcnArchName="",
    shared_memory_per_block_optin=SHARED[90], regs_per_multiprocessor=REGISTERS, max_threads_per_multi_processor=2048)

_cpu_generator, _cpu_tensor = torch.Generator, torch.tensor


class _Generators(type):
    def __call__(cls, device="cpu"):
        return _cpu_generator("cpu")

    def __instancecheck__(cls, x):
        return isinstance(x, _cpu_generator)


class Generator(metaclass=_Generators):
    """In the place of torch.Generator: numbers for the device are drawn on the CPU."""


def tensor(data, *, dtype=None, device=None, requires_grad=False, pin_memory=False):
    """In the place of torch.tensor."""
    if isinstance(data, CudaTensor):
        device, data = device or data.device, data.held
    if isinstance(data, (list, tuple)) and any(isinstance(x, CudaTensor) for x in data):
        waits.note("tensor of values on the device")
        data = [x.held.item() if isinstance(x, CudaTensor) else x for x in data]
    made = _cpu_tensor(data, dtype=dtype)
    made = made if device is None else made.to(device)
    return made.requires_grad_(requires_grad)


def as_tensor(data, dtype=None, device=None):
    """In the place of torch.as_tensor."""
    if isinstance(data, torch.Tensor):
        return data.to(device or data.device, dtype or data.dtype)
    return tensor(data, dtype=dtype, device=device)


def set_sync_debug_mode(mode) -> None:
    waits.state.sync_debug_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)


def install() -> None:
    """Once, in a process of its own with guard.cpp preloaded: nothing takes it away."""
    nothing = lambda *_, **__: None
    zero = lambda *_, **__: 0
    yes = lambda *_, **__: True
    told = dict(
        _lazy_init=nothing, is_available=yes, is_initialized=yes, is_bf16_supported=yes,
        device_count=lambda: 1, current_device=zero, set_device=nothing,
        get_device_capability=lambda device=None: CAPABILITY, get_device_name=lambda device=None: NAME,
        get_device_properties=lambda device=None: PROPERTIES, mem_get_info=lambda device=None: (MEMORY, MEMORY),
        memory_reserved=zero, memory_allocated=zero, max_memory_allocated=zero, reset_peak_memory_stats=nothing,
        empty_cache=nothing, synchronize=lambda device=None: waits.note("torch.cuda.synchronize"), _sleep=nothing,
        manual_seed=nothing, manual_seed_all=nothing,
        get_rng_state=lambda device=None: torch.empty(0, dtype=torch.uint8, device="cpu"), set_rng_state=nothing,
        get_sync_debug_mode=lambda: waits.state.sync_debug_mode, set_sync_debug_mode=set_sync_debug_mode,
        is_current_stream_capturing=lambda: waits.state.capture is not None,
        current_stream=lambda device=None: _streams[-1], default_stream=lambda device=None: _streams[0],
        Stream=Stream, Event=Event, stream=stream, device=device, CUDAGraph=graphs.CUDAGraph, graph=_Capture)
    for name, value in told.items():
        setattr(torch.cuda, name, value)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Generator, torch.tensor, torch.as_tensor = Generator, tensor, as_tensor
    torch.autograd.set_multithreading_enabled(False)  # so that a wait in a backward is made from a line of Python
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a CudaTensor is no .data of a CPU tensor
    tensors.MODE.__enter__()  # of this thread; others begin with one of their own
    run = threading.Thread.run

    def on_the_device(thread):
        with tensors.Mode():
            run(thread)

    threading.Thread.run = on_the_device
