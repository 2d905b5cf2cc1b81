"""Basic blocks of a kernel, and the registers that each instruction reads and writes.

A block ends at a branch, at an exit, or at an instruction on which a warp may have to wait (bar, mbarrier.try_wait).
"""

from dataclasses import dataclass, field

from .forms import blocking
from .ptx import Instr, Kernel, Mem, Not, Reg, Sink, Vec

# PTX type (PTX ISA 5.2) -> numpy type of the register view an instruction computes in
TYPES = {
    "u8": "u1",
    "s8": "i1",
    "b8": "u1",
    "u16": "u2",
    "s16": "i2",
    "b16": "u2",
    "f16": "f2",
    "bf16": "u2",
    "u32": "u4",
    "s32": "i4",
    "b32": "u4",
    "f32": "f4",
    "u64": "u8",
    "s64": "i8",
    "b64": "u8",
    "f64": "f8",
    "pred": "b",
    "f16x2": "u4",
    "bf16x2": "u4",
    "s16x2": "u4",
    "u16x2": "u4",
}

WIDTH = {"u1": 1, "i1": 1, "u2": 2, "i2": 2, "f2": 2, "u4": 4, "i4": 4, "f4": 4, "u8": 8, "i8": 8, "f8": 8}


STRONG = {"volatile", "relaxed", "acquire"}  # loads that observe other CTAs' stores


@dataclass
class Block:
    index: int
    instrs: list[Instr] = field(default_factory=list)
    end: Instr | None = None  # bra, ret, or a blocking instruction
    target: int = -1
    sources: dict = field(default_factory=dict)  # masked -> code object


def split_blocks(kernel: Kernel) -> list[Block]:
    """Blocks in program order. Labels without a branch to them ($L__tmp, from debug information) start no block."""
    targets = {item.args[0].name for item in kernel.code if isinstance(item, Instr) and item.parts[0] == "bra"}
    blocks, labels = [Block(0)], {}

    def start_block():
        if blocks[-1].instrs or blocks[-1].end:
            blocks.append(Block(len(blocks)))

    for item in kernel.code:
        if isinstance(item, str):
            if item in targets:
                start_block()
                labels[item] = blocks[-1].index
            continue
        if blocks[-1].end:
            start_block()
        if item.parts[0] in ("bra", "ret", "exit", "trap"):
            blocks[-1].end = item
        elif blocking(item):  # a block of its own, because it may be executed again
            start_block()
            blocks[-1].end = item
        else:
            blocks[-1].instrs.append(item)
    for block in blocks:
        if block.end and block.end.parts[0] == "bra":
            block.target = labels[block.end.args[0].name]
    return blocks


def spin_loops(blocks: list[Block]) -> frozenset[int]:
    """Indices of the blocks of innermost loops with an atomic or a strong load: a warp may wait there for another CTA."""
    loops = [range(block.target, block.index + 1) for block in blocks if 0 <= block.target <= block.index]
    found: set[int] = set()
    for block in blocks:
        enclosing = [loop for loop in loops if block.index in loop]
        if enclosing and any(instr.parts[0] == "atom" or instr.parts[0] == "ld" and STRONG & {*instr.parts}
                          for instr in block.instrs):
            found |= set(min(enclosing, key=len))
    return frozenset(found)


def registers(arg):
    if isinstance(arg, Reg):
        yield arg
    elif isinstance(arg, Not):
        yield arg.reg
    elif isinstance(arg, Vec):
        for item in arg.items:
            yield from registers(item)
    elif isinstance(arg, Mem):
        yield from registers(arg.base)
        for item in arg.coords:
            yield from registers(item)


def indices(places: list[int]) -> list[int] | slice:
    """A slice if these are consecutive: numpy then selects a view."""
    following = places and places == list(range(places[0], places[0] + len(places)))
    return slice(places[0], places[-1] + 1) if following else places


NO_DEST = (
    "st",
    "red",
    "cp",
    "bar",
    "barrier",
    "bra",
    "ret",
    "exit",
    "mbarrier",
    "fence",
    "membar",
    "wgmma",
    "setmaxnreg",
    "prefetch",
    "prefetchu",
    "stmatrix",
    "trap",
    "tensormap",
    "griddepcontrol",
    "nanosleep",
    "discard",
    "applypriority",
)


def reads_and_writes(instr: Instr):
    """(registers read, registers written)."""
    root = instr.parts[0]
    reads, writes = [], []
    if root == "wgmma" and instr.parts[1] == "mma_async":
        writes = list(registers(instr.args[0]))
        reads = [r for a in instr.args for r in registers(a)]
    elif root == "mbarrier" and instr.parts[1] in ("try_wait", "test_wait", "arrive"):
        first = instr.args[0]
        if isinstance(first, (Reg, Vec, Sink)):
            writes = list(registers(first))
            reads = [r for a in instr.args[1:] for r in registers(a)]
        else:
            reads = [r for a in instr.args for r in registers(a)]
    elif root in NO_DEST:
        reads = [r for a in instr.args for r in registers(a)]
    else:
        writes = list(registers(instr.args[0]))
        reads = [r for a in instr.args[1:] for r in registers(a)]
    if instr.guard:
        reads.append(instr.guard)
        reads += writes
    return reads, writes
