"""Reading SASS, an NVIDIA GPU's machine code as cuobjdump prints it: instructions, loops, widths of memory accesses."""

import re
from dataclasses import dataclass
from functools import reduce

# An instruction starts with its address in a comment; the comment behind it is its encoding, which starts with 0x.
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*(?:\?\S+\s*)*;")
PREDICATE = re.compile(r"@!?U?P\w+\s+")
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
DRAIN = "WARPGROUP.DEPBAR.LE gsb0, 0x0"  # waits until no wgmma is left in flight
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes; 4 where none is named
BULK = 16  # bytes: the least that one bulk copy (TMA) moves


@dataclass(frozen=True)
class Instruction:
    address: int  # bytes from the start of its function
    text: str  # with its predicate: "@!P0 BRA 0x24d0"

    @property
    def body(self) -> str:
        return PREDICATE.sub("", self.text)

    @property
    def opcode(self) -> str:
        return self.body.split()[0]

    @property
    def base(self) -> str:
        """The opcode without its modifiers: LDG of LDG.E.128."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """The address a branch goes to; None for everything else, and for branches through a register."""
        found = re.search(r"\b0x([0-9a-f]+)$", self.body) if self.base in ("BRA", "JMP") else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow: not behind EXIT, RET or a branch without a condition."""
        ends = self.base in ("EXIT", "RET") or re.fullmatch(r"(BRA|JMP)\S* 0x[0-9a-f]+", self.body)
        return not ends or self.body != self.text


def functions(sass: str) -> list[list[Instruction]]:
    """The instructions of each function of a listing, in order."""
    listings = sass.split("Function :")[1:] or [sass]
    return [[Instruction(int(address, 16), text) for address, text in LINE.findall(listing)] for listing in listings]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The natural loops of one function.

    A loop belongs to a block that every path to one of its predecessors runs through. A backward branch alone does not
    make one: code that ptxas moves out of line (the retry of a barrier's wait) jumps back into the middle of a loop.
    """
    position = {instruction.address: index for index, instruction in enumerate(code)}
    targets = {position[i.target] for i in code if i.target in position}
    behind = {index + 1 for index, i in enumerate(code) if i.target is not None or not i.falls_through}
    starts = sorted(({0} | targets | behind) & set(range(len(code))))
    block_at = {start: block for block, start in enumerate(starts)}
    blocks = [code[start:end] for start, end in zip(starts, [*starts[1:], len(code)], strict=True)]

    predecessors = [set() for _ in blocks]
    for number, block in enumerate(blocks):
        if block[-1].target in position:
            predecessors[block_at[position[block[-1].target]]].add(number)
        if block[-1].falls_through and number + 1 < len(blocks):
            predecessors[number + 1].add(number)

    # Sets of blocks are the bits of ints, with one bit more that only blocks keep which nothing reaches (the padding
    # behind EXIT, a branch to itself).
    unreached = 1 << len(blocks)
    everything = 2 * unreached - 1
    dominators = [1, *[everything] * (len(blocks) - 1)]
    changed = True
    while changed:
        changed = False
        for number in range(1, len(blocks)):
            common = reduce(int.__and__, (dominators[p] for p in predecessors[number]), everything)
            changed |= dominators[number] != common | 1 << number
            dominators[number] = common | 1 << number

    found = []
    for head in range(len(blocks)):
        ahead = [p for p in predecessors[head] if dominators[p] >> head & 1 and not dominators[p] & unreached]
        inside, is_loop = {head}, bool(ahead)
        while ahead:
            number = ahead.pop()
            if number not in inside:
                inside.add(number)
                ahead.extend(predecessors[number])
        if is_loop:
            found.append([i for number in sorted(inside) for i in blocks[number]])
    return found


def main_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that hold wgmma instructions."""
    having = [loop for loop in loops(code) if any(i.base == "HGMMA" for i in loop)]
    spans = [{i.address for i in loop} for loop in having]
    return [loop for loop, span in zip(having, spans, strict=True) if not any(other < span for other in spans)]


def drains(code: list[Instruction]) -> tuple[int, ...]:
    """For each main loop, how often an iteration waits until the matrix unit has nothing left to do."""
    return tuple(sum(i.body.startswith(DRAIN) for i in loop) for loop in main_loops(code))


def widest(code: list[Instruction], *bases: str, bulk: str) -> int:
    """Bytes of the widest access of one thread among opcodes ``bases`` and bulk copies ``bulk``; 0: there is none."""
    return max((BULK if i.base == bulk else max((WIDTHS.get(part, 0) for part in i.opcode.split(".")), default=0) or 4
                for i in code if i.base in (*bases, bulk)), default=0)
