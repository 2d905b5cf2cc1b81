"""What some kernels must compile to beyond the gate of tests/test_aot.py: attention's products beside its exponentials, the
shared memory of its largest tiles, cosines computed in full.
"""

import sys
from functools import partial
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if sys.platform != "linux":
    pytest.skip("cuobjdump comes with Triton's wheels for Linux only", allow_module_level=True)

from kernel_launches import call_attention  # noqa: E402

from sora_fast.cyclemodel import GPUS, blocks_per_sm  # noqa: E402
from sora_fast.kernels.arch import SHARED  # noqa: E402
from sora_fast.kernels.attention_candidates import candidates  # noqa: E402
from sora_fast.kernels.attention_config import HEURISTICS, Launch  # noqa: E402
from sora_fast.testing import aot, sass  # noqa: E402
from sora_fast.testing.launches import rotary  # noqa: E402

pytestmark = pytest.mark.full


def _compiled(head_dim, cc=90, only="", **mask):
    """(name, warps, what it compiles to) of attention's kernels of a forward and backward, of all three or only one."""
    for launch in aot.launches(partial(call_attention, 300, 300, 2, 4, 4, head_dim, gpu=f"sm{cc}", **mask)):
        name = launch.fn.__name__
        if name != "schedule_kernel" and name.startswith(only):
            case = launch.case(name)
            options = case.options
            yield name, options["num_warps"], aot.compile_for(case.fn, case.signature, case.constexprs, case.aligned, cc,
                                                              **options)


def _events(loop):
    """An iteration as letters: G a product, e exp2 (MUFU.EX2), W a wait for all products."""
    return "".join("G" if i.base == "HGMMA" else "e" if i.opcode.startswith("MUFU.EX2") else
                   "W" if i.body.startswith(sass.DRAIN) else "" for i in loop)


def interleaved(events: str) -> int:
    """How many exp2 stand behind a product that nothing has waited for yet, and so run beside it.

    The loop is a ring: the products at its end are in flight at its start.
    """
    count, flying = 0, False
    for place, event in enumerate(events * 2):
        flying = event == "G" or flying and event != "W"
        count += place >= len(events) and event == "e" and flying
    return count


def test_interleaving_is_counted():
    assert interleaved("GGWeeee") == 0 and interleaved("eeeeGGW") == 0
    assert interleaved("GeeGeW") == 3 and interleaved("eeWGG") == 2


@pytest.mark.parametrize("head_dim, mask", [(64, {}), (72, {}), (96, {}), (128, {}), (128, dict(causal=True))], ids=str)
def test_products_and_powers_run_beside_each_other(head_dim, mask):
    """On sm_90: most exp2 while a product is in flight, or beside another program; no spill in a main loop, P never out of
    registers."""
    for name, warps, compiled in _compiled(head_dim, **mask):
        (loop,) = [loop for code in compiled.functions for loop in sass.main_loops(code)]
        events = _events(loop)
        programs, _ = blocks_per_sm(GPUS["h200"], compiled.registers, compiled.shared, warps)
        assert programs > 1 or interleaved(events) >= events.count("e") / 2, f"{name}: {events}"
        assert not any(i.base in ("LDL", "STL") for i in loop), name
        if name == "forward_kernel":
            assert not any(i.base.startswith("STS") for i in loop), "P goes through shared memory"
            products = [i.text for i in loop if i.base == "HGMMA"]
            assert sum("gdesc" in text.split(",")[1] for text in products) < len(products), "no product has P in registers"


@pytest.mark.parametrize("cc", (86, 90))
@pytest.mark.parametrize("kernel", HEURISTICS)
def test_the_largest_candidate_fits(kernel, cc):
    """As it is compiled, within the shared memory of a program."""
    launch = Launch(128, torch.bfloat16, 1, False)
    largest = max(candidates(kernel, launch, f"sm{cc}"), key=lambda c: (c.block_m + c.block_n) * (1 + c.stages))
    with mock.patch.dict(HEURISTICS, {kernel: lambda launch, gpu: largest}):
        (compiled,) = [compiled for *_, compiled in _compiled(128, cc=cc, only=kernel)]
    assert 0 < compiled.shared <= SHARED[cc], largest


def test_cosines_are_computed_in_full():
    """No sin.approx, whose error grows with the angle, and no table in local memory; forward and backward."""
    call = partial(rotary.both, 6, 6, 64, torch.bfloat16, "rms_head", "half", "fixed", ("weight",))
    for case in aot.cases_of("cosines", call, {}):
        compiled = aot.compile_for(case.fn, case.signature, case.constexprs, case.aligned, 90, **case.options)
        assert "FFMA" in compiled.sass and "MUFU.SIN" not in compiled.sass and "MUFU.COS" not in compiled.sass
        assert compiled.spills == 0
