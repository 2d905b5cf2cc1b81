"""The machine code of every CUDA kernel, as the build left it in build/cuda: no GPU is needed to read it."""

import re
import shutil

import cuda_resources
import pytest

from sora_fast.testing import sass

OBJECTS = [cuda_resources.BUILT / f"{family}.o" for family in cuda_resources.FAMILIES]

pytestmark = [
    pytest.mark.skipif(not all(path.exists() for path in OBJECTS), reason="the CUDA extension was not built here"),
    pytest.mark.skipif(not (cuda_resources.cuobjdump() and shutil.which("c++filt") and shutil.which("g++")),
                       reason="needs cuobjdump (in Triton's wheel), c++filt and g++"),
]


@pytest.fixture(scope="module")
def kernels():
    return {family: cuda_resources.kernels(family) for family in cuda_resources.FAMILIES}


def violations(kernel) -> list[str]:
    """What is wrong with a kernel's machine code, in sentences."""
    found = []
    if kernel.spills or kernel.stack:
        found.append(f"{kernel.name}, {kernel.arch}: expected no spills, got {kernel.spills} and a stack of {kernel.stack}")
    if kernel.arch != "sm_90a":
        return found
    family, numbers = kernel.name.partition("<")[0], kernel.numbers
    if family == "causal_conv3d_kernel":
        width, full = numbers
        blocks = 2 if width <= 192 else 1
        slices = [4] if full < 0 else [4] * full + [2]  # products of 16 numbers in the slices of a turn of the main loop
        wants = dict(products=blocks * sum(slices), loads=2, waits=(0,), waits_in_all=len(slices) + 1)
    elif family == "wgmma_selftest_kernel":
        wants = dict(products=numbers[1] // 16, loads=4, waits=(1,), waits_in_all=1)
    else:
        return found + [f"{kernel.name}: expected a kernel of this test's, got another; say what its code must hold"]
    got = dict(products=kernel.count("HGMMA"), loads=kernel.count("UTMALDG"), waits=kernel.waits,
               waits_in_all=kernel.waits_in_all)
    return found + [f"{kernel.name}: expected {name} {wants[name]}, got {got[name]}"
                    for name in wants if got[name] != wants[name]]


@pytest.mark.parametrize("family", cuda_resources.FAMILIES)
def test_machine_code_is_as_meant(kernels, family):
    assert kernels[family]
    assert not [sentence for kernel in kernels[family] for sentence in violations(kernel)]


def test_every_width_is_there(kernels):
    names = {kernel.name for kernel in kernels["convolution"]}
    assert names == {f"causal_conv3d_kernel<{n}, {full}>" for n in (96, 128, 160, 192, 256) for full in (-1, 1, 2)}


def test_the_assembler_did_not_serialise():
    """ptxas says C7510 to C7519 where it waits for every product, and C7508 where it leaves setmaxnreg out."""
    for family in cuda_resources.FAMILIES:
        report = (cuda_resources.BUILT / f"{family}.log").read_text()
        assert "registers" in report, f"{family}: the build left no report of ptxas"
        assert not re.findall(r"\(C75\d\d\).*", report)


def test_objects_are_of_these_sources():
    for path in OBJECTS:
        waiting, seen = {f"{path.stem}.cu"}, set()
        while waiting:
            name = waiting.pop()
            seen.add(name)
            source = cuda_resources.ROOT / "csrc" / name
            if name == "simt.h":  # of tests/csrc
                continue
            assert source.stat().st_mtime <= path.stat().st_mtime, f"{path} is older than {name}: pip install -e . again"
            waiting |= set(re.findall(r'#include "(.+)"', source.read_text())) - seen


def test_the_committed_table_is_what_was_built():
    committed = cuda_resources.TABLE.read_text(encoding="utf-8")
    if f"nvcc {cuda_resources.nvcc_version()};" not in committed:
        pytest.skip("the table is of another nvcc, whose registers differ")
    assert committed == cuda_resources.table(), "write it anew: python tests/cuda_resources.py"


def test_spills_and_waits_are_seen(kernels):
    """The gate on code that spills, waits too often and lacks a product."""
    good = next(kernel for kernel in kernels["convolution"] if kernel.name == "causal_conv3d_kernel<96, 1>")
    place = next(i for i, instruction in enumerate(good.code) if instruction.base == "HGMMA")
    edited = lambda text: [*good.code[:place], sass.Instruction(good.code[place].address, text), *good.code[place + 1:]]
    for text, word in (("STL [R1], R2", "spills"), (sass.DRAIN, "waits")):
        found = violations(cuda_resources.Kernel(good.name, good.arch, good.registers, 0, edited(text)))
        assert any(word in sentence for sentence in found) and any("products" in sentence for sentence in found)
