"""Runs PTX written in a test: one kernel over numpy arrays. And the forms of instructions that our kernels use."""

import re
import struct
from pathlib import Path

from sora_fast.emulator import memory
from sora_fast.emulator.codegen import Program
from sora_fast.emulator.machine import Launch
from sora_fast.emulator.ptx import parse

FORMS = [line.split("\t")[0] for line in Path(__file__).with_name("emulator_forms.txt").read_text().splitlines()]
HEAD = ".version 8.5\n.target sm_90a\n.address_size 64\n"


def execute(body, arrays, *, threads=32, grid=(1, 1, 1), registers="", shared=0, variables="", **options):
    """Run ``body``, in which %p0, %p1, ... are the arrays' addresses and %t is the thread."""
    params = ", ".join(f".param .u64 k_param_{i}" for i in range(len(arrays)))
    loads = "\n".join(f"ld.param.u64 %p{i}, [k_param_{i}];" for i in range(len(arrays)))
    text = f"""{HEAD}{variables}
.visible .entry k({params}) {{
.reg .b64 %p<9>; .reg .b64 %d<40>; .reg .b32 %r<99>; .reg .b16 %h<20>;
.reg .pred %q<9>; .reg .f32 %f<99>; .reg .b32 %t; .reg .b64 %t4; {registers}
mov.u32 %t, %tid.x; mul.wide.u32 %t4, %t, 4;
{loads}
{body}
ret;
}}"""
    (kernel,) = parse(text).values()
    allocations = memory.Allocations()
    for i, a in enumerate(arrays):
        allocations.add(a.ctypes.data, a.nbytes, f"array {i}", a.itemsize)
    raw = b"".join(struct.pack("<Q", a.ctypes.data) for a in arrays)
    return Launch(Program(kernel), grid, (threads, 1, 1), raw, allocations, shared=shared, **options)


def matching(pattern):
    return [form for form in FORMS if re.fullmatch(pattern, form)]


def bits_of(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def half_bits(x, kind):
    """A number as float16 ("f16") or bfloat16, to nearest, ties to even."""
    if kind == "f16":
        return struct.unpack("<H", struct.pack("<e", x))[0]
    bits = bits_of(x)
    low, high = bits & 0xFFFF, bits >> 16
    return (high + (low > 0x8000 or low == 0x8000 and high & 1)) & 0xFFFF
