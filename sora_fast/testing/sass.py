"""What tests ask of SASS, an NVIDIA GPU's machine code: matrix instructions, drains of wgmma, widths of memory accesses."""

from ..cyclemodel.sass import WIDTHS, Instruction, functions, innermost, loops

MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
DRAIN = "WARPGROUP.DEPBAR.LE gsb0, 0x0"  # waits until no wgmma is left in flight
BULK = 16  # bytes: the least that one bulk copy (TMA) moves


def main_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that hold wgmma instructions."""
    return innermost([loop for loop in loops(code) if any(i.base == "HGMMA" for i in loop)])


def drains(code: list[Instruction]) -> tuple[int, ...]:
    """For each main loop, how often an iteration waits until the Tensor Cores have nothing left to do."""
    return tuple(sum(i.body.startswith(DRAIN) for i in loop) for loop in main_loops(code))


def widest(code: list[Instruction], *bases: str, bulk: str) -> int:
    """Bytes of the widest access of one thread among opcodes ``bases`` and bulk copies ``bulk``; 0: there is none."""
    return max((BULK if i.base == bulk else max((WIDTHS.get(part, 0) for part in i.opcode.split(".")), default=0) or 4
                for i in code if i.base in (*bases, bulk)), default=0)


__all__ = ["BULK", "DRAIN", "MATRIX", "WIDTHS", "Instruction", "drains", "functions", "loops", "main_loops", "widest"]
