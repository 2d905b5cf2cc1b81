"""What drive_setup.py sets up, and that in a process of its own, on the same fake device:

python -m fake_device.setup_process CACHE WIDTH [KILLED]

KILLED: it kills itself within its so-and-so-manieth write of a measured time, once the new file is there and not renamed.
"""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sora_fast import dispatch, measured, ops
from sora_fast.benchmarks import timing
from sora_fast.dispatch import Backend
from sora_fast.ops.modulation import GATE_RESIDUAL, NORM_MODULATE
from sora_fast.testing import validation
from sora_fast.tuning import setting_up, workers

CLEAN = {op.name: dict(op.backends) for op in (GATE_RESIDUAL, NORM_MODULATE)}
TAKEN = dict(gate_residual="triton", norm_modulate="torch")  # what is right once it is set up


class Layer(nn.Module):
    def forward(self, x, table):
        x = ops.gate_residual(x, x, table)
        return ops.norm_modulate(x, table, table)


class Model(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.layer, self.table = Layer(), nn.Parameter(torch.randn(1, width))

    def forward(self, x):
        return self.layer(x, self.table)


def call(model):
    return model(torch.randn(32, model.table.shape[1], device="cuda"))


def taken(model) -> dict[str, str]:
    """The backend of each op that a call of the model runs."""
    found = {}
    with dispatch.watched(lambda op, problem, backend: (found.__setitem__(op.name, backend.name), backend)[1]):
        with torch.no_grad():
            call(model)
    return found


def shorten(patch) -> None:
    """One case of each op, short times; an op whose PyTorch is slow, one whose kernel is, with a wrong fast peer."""
    few, short = validation.cases, timing.Effort(0.0, 0.0)
    patch(validation, "cases", lambda *asked: list(few(*asked))[:1])
    patch(setting_up, "EFFORT", short)
    patch(setting_up, "SETS", 1)
    patch(setting_up, "release", lambda device: None)
    patch(workers, "cores", lambda: 1)  # other processes have no fake device
    patch(timing, "LEAST_SAMPLES", timing.ROUNDS)
    # a graph here would replay operators, and no time that passes between them
    patch(timing, "timer", lambda calls, device, stream: timing.Events(calls, device, stream))
    wrong = Backend("xformers", lambda x, **given: x)
    patch(GATE_RESIDUAL, "backends", GATE_RESIDUAL.backends | {"torch": _slow(CLEAN["gate_residual"]["torch"])})
    patch(NORM_MODULATE, "backends", NORM_MODULATE.backends | {"triton": _slow(CLEAN["norm_modulate"]["triton"]),
                                                              "xformers": wrong})
    measured.forget()


def _slow(backend: Backend) -> Backend:
    return replace(backend, run=lambda **given: (time.sleep(0.5), backend.run(**given))[1])


def _die_within_write(place: int) -> None:
    rename, seen = os.replace, []

    def replace_file(source, target):
        seen.extend([target] if Path(target).name == measured.user_file().name else [])
        if len(seen) == place:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace_file


if __name__ == "__main__":
    from . import plugin  # noqa: F401
    from .kernels import emulated

    cache, width, *killed = sys.argv[1:]
    with emulated():
        os.environ["SORA_FAST_CACHE"] = cache  # now: what is compiled for the emulator is kept where it always is
        shorten(setattr)
        if killed:
            _die_within_write(int(killed[0]))
        model = Model(int(width)).to("cuda").eval()
        setting_up.setup(model, call=call, jobs=1, tell=lambda line: print(line, flush=True))
        print(json.dumps(taken(model)))
