"""What calls launch, found without a launch and without memory: kernels to compile ahead, and the Configs they have.

A call is made once more with tensors of the device "meta", and the launches of its operators are recorded.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .. import configs
from ..dispatch import use_emulated_gpu
from ..explanation import all_ops
from ..testing.rule import tensors
from .recorded import Recorded


@dataclass
class Launched(TorchDispatchMode):
    """``launches``: of Triton kernels, in order (sora_fast.testing.aot); ``lookups``: of Configs, each with its answer."""

    launches: list = field(default_factory=list)
    lookups: dict[configs.Asked, object] = field(default_factory=dict)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        from ..testing import aot

        kwargs = kwargs or {}
        if operator.namespace == "sora_fast":
            self.launches += aot.launches(lambda: operator._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs))
        return operator(*args, **kwargs)


def launched(case: Recorded, gpu: str) -> Launched:
    """What the backend "triton" launches for ``case`` on ``gpu`` ("sm90-H200"), backward included; nothing if it cannot."""
    backend, found = all_ops()[case.op].backends.get("triton"), Launched()
    if backend is None or backend.unsupported(case.problem):
        return found
    (names,) = case.directions().values()
    inputs = case.inputs("meta", 0)
    given = {name: value.requires_grad_(name in names) if isinstance(value, torch.Tensor) else value
             for name, value in inputs.items()}
    with use_emulated_gpu(SimpleNamespace(arch=gpu)), configs.recording(tuned=True) as found.lookups, found:
        with torch.set_grad_enabled(bool(names)):
            outputs = tensors(backend.run(**given))
        if names:
            outputs = [each for each in outputs if each.requires_grad]
            torch.autograd.grad(outputs, [given[name] for name in names], list(map(torch.empty_like, outputs)),
                                allow_unused=True)
    return found


def key(launch) -> tuple:
    """What two launches share that Triton compiles one kernel for."""
    case = launch.case(launch.fn.__name__)
    facts = (str(sorted(each.items(), key=str)) for each in (case.constexprs, case.signature, case.options))
    return launch.fn, case.aligned, *facts
