"""A reader of SASS as cuobjdump prints it: instructions with their control bits, basic blocks, loops.

ptxas encodes in each 128-bit instruction its stall count and the scoreboards that it sets and waits for; a listing without
encodings is read as instructions that take one cycle and wait for nothing.
"""

import re
from dataclasses import dataclass
from functools import cached_property, reduce

# An instruction starts with its address in a comment; the comments after it are the two words of its encoding.
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*(?:\?\S+\s*)*;"
                  r"(?:\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/)?")
PREDICATE = re.compile(r"@!?U?P\w+\s+")
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes; 4 where none is named
NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Instruction:
    address: int  # bytes from the start of its function
    text: str  # with its predicate: "@!P0 BRA 0x24d0"
    stall: int = 1  # cycles before the warp's next instruction
    write_scoreboard: int = NO_SCOREBOARD  # held until the result is written
    read_scoreboard: int = NO_SCOREBOARD  # held until the operands are read
    wait_mask: int = 0  # mask of scoreboards that must be free

    @cached_property
    def body(self) -> str:
        return PREDICATE.sub("", self.text)

    @cached_property
    def opcode(self) -> str:
        return self.body.split()[0]

    @cached_property
    def base(self) -> str:
        """The opcode without its modifiers: LDG of LDG.E.128."""
        return self.opcode.split(".")[0]

    @cached_property
    def predicated_off(self) -> bool:
        """Whether its predicate is always false: it is issued and does nothing."""
        return self.text.startswith(("@!PT", "@!UPT"))

    @cached_property
    def width(self) -> int:
        """Bytes that one thread accesses."""
        return next((WIDTHS[part] for part in self.opcode.split(".") if part in WIDTHS), 4)

    @cached_property
    def target(self) -> int | None:
        """The target address of a branch; None for everything else, and for indirect branches.

        On sm_80 ptxas exits loops by a predicated CALL, which does not return.
        """
        jumps = self.base in ("BRA", "JMP") or self.base == "CALL" and self.text != self.body
        found = re.search(r"\b0x([0-9a-f]+)$", self.body) if jumps else None
        return int(found[1], 16) if found else None

    @cached_property
    def falls_through(self) -> bool:
        """Whether control may fall through: not after EXIT, RET or an unconditional branch."""
        ends = self.base in ("EXIT", "RET") or re.fullmatch(r"(BRA|JMP)\S* 0x[0-9a-f]+", self.body)
        return not ends or self.body != self.text


def _instruction(address: str, text: str, high: str) -> Instruction:
    if not high:
        return Instruction(int(address, 16), text)
    word = int(high, 16)  # bits 64 to 127
    return Instruction(int(address, 16), text, word >> 41 & 15, word >> 46 & 7, word >> 49 & 7, word >> 52 & 63)


def named_functions(sass: str) -> dict[str, list[Instruction]]:
    """The instructions of each function of a listing, in order; "" names one without a name."""
    parts = [part.partition("\n") for part in sass.split("Function :")[1:]] or [("", "", sass)]
    return {name.strip(): [_instruction(*found) for found in LINE.findall(listing)] for name, _, listing in parts}


def functions(sass: str) -> list[list[Instruction]]:
    return list(named_functions(sass).values())


def graph(code: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks of one function, and the indices of each block's successors."""
    position = {instruction.address: index for index, instruction in enumerate(code)}
    targets = {position[i.target] for i in code if i.target in position}
    branch_ends = {index + 1 for index, i in enumerate(code) if i.target is not None or not i.falls_through}
    starts = sorted(({0} | targets | branch_ends) & set(range(len(code))))
    block_at = {start: block for block, start in enumerate(starts)}
    blocks = [code[start:end] for start, end in zip(starts, [*starts[1:], len(code)], strict=True)]
    successors = []
    for number, block in enumerate(blocks):
        next_block = [number + 1] if block[-1].falls_through and number + 1 < len(blocks) else []
        jump = [block_at[position[block[-1].target]]] if block[-1].target in position else []
        successors.append(jump + next_block)
    return blocks, successors


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The natural loops of one function.

    A back edge goes to a block that dominates its source. A backward branch alone is not one: code that ptxas moves out of
    line (the retry of a barrier's wait) jumps back into the middle of a loop.
    """
    blocks, successors = graph(code)
    predecessors = [set() for _ in blocks]
    for number, following in enumerate(successors):
        for each in following:
            predecessors[each].add(number)

    # Sets of blocks are bit masks, with one extra bit that only unreachable blocks keep (the padding after EXIT, a
    # branch to itself).
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


def innermost(loops: list[list[Instruction]]) -> list[list[Instruction]]:
    """The innermost of ``loops``."""
    spans = [{i.address for i in loop} for loop in loops]
    return [loop for loop, span in zip(loops, spans, strict=True) if not any(other < span for other in spans)]
