"""Execution paths of a warp: one iteration of a loop, or from a kernel's entry to its exit."""

from collections.abc import Callable

from . import sass
from .sass import Instruction
from .units import BULK, GLOBAL, flops

SPECIAL = ("MUFU.EX2", "MUFU.RSQ")
CALL = 100  # instructions of a subroutine: about those of a full-precision division


def _postorder(start: int, successors: list[list[int]], inside: set[int]) -> dict[int, int]:
    """Postorder index of each block; an edge to a later block, or to itself, closes a loop."""
    position, visited, stack = {}, {start}, [(start, iter(successors[start]))]
    while stack:
        number, following = stack[-1]
        for each in following:
            if each in inside and each not in visited:
                visited.add(each)
                stack.append((each, iter(successors[each])))
                break
        else:
            position[number] = len(position)
            stack.pop()
    return position


def _best_path(blocks, successors, start: int, inside: set[int], ends: Callable[[int], bool]) -> list[Instruction] | None:
    """The path from ``start`` to a block that ``ends`` with the most FLOPs, then the most bytes, then the most exponentials
    and square roots, then the fewest instructions.

    So masked boundary tiles, which are few, are ignored, and optional norms and activations are on.
    """
    position = _postorder(start, successors, inside)
    best: dict[int, tuple] = {}
    for number in sorted(position, key=position.get):
        options = [(best[each][:4], each) for each in successors[number]
                   if each in best and position[each] < position[number]]
        if ends(number):
            options.append(((0, 0, 0, 0), None))
        if not options:
            continue
        (work, moved, special, count), following = max(options, key=lambda option: option[0])
        block = blocks[number]
        work += sum(map(flops, block))
        moved += sum(i.width for i in block if i.base in (*GLOBAL, *BULK))
        special += sum(i.opcode.startswith(SPECIAL) for i in block)
        count -= len(block) + CALL * sum(i.base == "CALL" and i.target is None for i in block)
        best[number] = (work, moved, special, count, following)
    if start not in best:
        return None
    found, number = [], start
    while number is not None:
        found += blocks[number]
        number = best[number][4]
    return found


def iteration(loop: list[Instruction], code: list[Instruction]) -> list[Instruction]:
    """One iteration of a loop of ``code``, for interior tiles."""
    addresses = {i.address for i in loop}
    blocks, successors = sass.graph(code)
    inside = {number for number, block in enumerate(blocks) if block[0].address in addresses}
    outside = set(range(len(blocks))) - inside
    heads = {each for number in outside for each in successors[number]} & inside
    head = min(heads or inside)
    return _best_path(blocks, successors, head, inside, lambda number: head in successors[number]) or list(loop)


def entry_to_exit(code: list[Instruction]) -> list[Instruction]:
    """From entry to exit, with each loop executed once."""
    blocks, successors = sass.graph(code)
    ends = lambda number: any(i.base == "EXIT" and i.text == i.body for i in blocks[number])
    return _best_path(blocks, successors, 0, set(range(len(blocks))), ends) or list(code)


def main_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops with MMAs; if there are none, those that access global memory."""
    loops = sass.loops(code)
    matrix = [loop for loop in loops if any(map(flops, loop))]
    return sass.innermost(matrix or [loop for loop in loops if any(i.base in (*GLOBAL, *BULK) for i in loop)])
