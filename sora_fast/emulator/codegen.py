"""PTX instructions to Python source over numpy arrays.

A block becomes a function ``f(i, k)`` of the warps that execute it together: ``i`` selects them (a slice or an index
array), ``k`` is None or the mask (warps, 32) of active lanes. Registers that are live in one block only are local variables;
the others are arrays (all warps, 32), written back at the end of the block. A register may have several typed views (u4,
i4, f4, ...) of the same bits.
"""

from collections import Counter

import numpy as np

from .blocks import TYPES, WIDTH, Block, indices, reads_and_writes, registers, spin_loops, split_blocks
from .codegen_arithmetic import Arithmetic
from .codegen_memory import Memory
from .forms import Unsupported, check
from .ptx import Imm, Instr, Kernel, Mem, Not, Reg, Sink, Special, Sym, Vec


class Program:
    """A kernel's blocks, and the constants and register arrays of their sources. Raises Unsupported."""

    def __init__(self, kernel: Kernel):
        check(kernel)
        self.kernel = kernel
        self.blocks = split_blocks(kernel)
        self.spin_blocks = spin_loops(self.blocks)
        self.constants: dict[tuple, str] = {}
        self.values: dict[str, np.ndarray] = {}
        self.instrs = [item for item in kernel.code if isinstance(item, Instr)]
        wgmmas = [x for x in self.instrs if x.op.startswith("wgmma.mma_async")]
        self.accumulator_regs = {r.name for x in wgmmas for r in registers(x.args[0])}
        self.cross_block_regs = set(self.accumulator_regs)  # live in more than one block
        self.accumulator_arrays: dict[tuple[str, ...], int] = {}  # D of a wgmma -> index of its array
        for x in wgmmas:
            self.accumulator_arrays.setdefault(tuple(r.name for r in registers(x.args[0])), len(self.accumulator_arrays))
        if sum(map(len, self.accumulator_arrays)) != len(self.accumulator_regs):
            raise Unsupported(f"{kernel.name}: accumulators of wgmma that overlap in part are not emulated")
        used = [r.name for x in wgmmas for a in x.args[:2] if isinstance(a, Vec) for r in registers(a)]
        self.wgmma_registers = {name: at for at, name in enumerate(dict.fromkeys(used))}  # accumulators and fragments of A
        for block in self.blocks:
            seen = set()
            for instr in [*block.instrs, *([block.end] if block.end else [])]:
                reads, writes = reads_and_writes(instr)
                self.cross_block_regs |= {r.name for r in reads if r.name not in seen}
                seen |= {r.name for r in writes}
                if instr is block.end:
                    self.cross_block_regs |= {r.name for r in writes}  # written by the machine

    def accumulators(self, names: tuple[str, ...]) -> str:
        """The name of a wgmma's accumulators: one array (warps, N / 8, 16, 8) that holds all of them."""
        return f"D_{self.accumulator_arrays[names]}"

    def constant(self, bits: int, kind: str, t: str) -> str:
        key = (bits, kind, t)
        if key not in self.constants:
            name = f"C_{len(self.constants)}"
            self.constants[key] = name
            if t == "b":
                value = np.array([[bool(bits)]])
            else:
                width = WIDTH[t]
                if kind == "f64" and width == 4:
                    bits = int(np.float32(np.uint64(bits).view(np.float64)).view(np.uint32))
                elif kind == "f32" and width == 8 and t == "f8":
                    bits = int(np.float64(np.uint32(bits).view(np.float32)).view(np.uint64))
                raw = (bits & (256**width - 1)).to_bytes(width, "little")
                value = np.frombuffer(raw, dtype="<" + t).reshape(1, 1)
            self.values[name] = value
        return self.constants[key]

    def code(self, block: Block, masked: bool):
        key = masked
        if key not in block.sources:
            source = BlockSource(self, block, masked).source()
            block.sources[key] = compile(
                source, f"<{self.kernel.name} block {block.index}{' masked' if masked else ''}>", "exec"
            )
            block.text = source
        return block.sources[key]


class BlockSource(Arithmetic, Memory):
    """Generates the source of one block."""

    def __init__(self, program: Program, block: Block, masked: bool):
        self.program, self.block, self.masked = program, block, masked
        self.lines: list[str] = []
        self.typed_views: dict[str, set] = {}  # per register, the types under which this block has it as a local variable
        self.loaded: set[str] = set()  # registers that are still views of their arrays
        self.dirty: dict[str, Reg] = {}
        self.guard: str | None = None
        self.temp = 0
        self.fragments: dict[tuple, str] = {}  # mma operands built so far, by their registers
        self.versions: Counter[str] = Counter()  # per register, how often it was written
        self.carry = False  # whether a mad.cc of this block has set the carry
        self.instr: Instr | None = None
        self.ftz = False
        self.accessed: dict[int, None] = {}  # registers of wgmma that other instructions access, in order
        self.accessing_instr = -1  # the first of those instructions
        self.fenced = False  # between a wgmma.fence of this block and the end of its group

    def source(self) -> str:
        for instr in self.block.instrs:
            self.emit_instr(instr)
        end, returned = self.block.end, "None"
        if end:
            self.begin(end)
            root = end.parts[0]
            if root in ("bra", "ret", "exit", "trap"):
                returned = self.guard or "None"
            elif root in ("bar", "barrier"):
                args = [self.get(a, "u4") for a in end.args]
                returned = f"({', '.join(args)},)"
            else:
                returned = f"({self.address(end.args[1], 'u4')}, {self.get(end.args[2], 'u4')})"
        self.flush()
        self.flush_accesses()
        body = "\n ".join([*self.lines, f"return {returned}"])
        return f"def f(i, k):\n {body}\n"

    def emit(self, line: str) -> None:
        self.lines.append(line)

    def flush(self, only=None) -> None:
        for name, reg in list(self.dirty.items()):
            if name in self.program.cross_block_regs and (only is None or name in only):
                t = self.any_view(reg)
                target = f"V_{name}_{t}"
                self.emit(f"P({target}, i, k, {name}_{t})" if self.masked else f"{target}[i] = {name}_{t}")
                del self.dirty[name]

    def any_view(self, reg: Reg) -> str:
        return next(iter(self.typed_views[reg.name]))

    def invalidate(self, names) -> None:
        for name in names:
            self.typed_views.pop(name, None)
            self.loaded.discard(name)
            self.versions[name] += 1

    def get(self, arg, t: str) -> str:
        if isinstance(arg, Reg):
            if arg.pred:
                t = "b"
            elif WIDTH[t] != arg.size:
                return self.resized(arg, t)
            known = self.typed_views.get(arg.name)
            if known is None:
                self.typed_views[arg.name] = {t}
                self.loaded.add(arg.name)
                self.emit(f"{arg.name}_{t} = V_{arg.name}_{t}[i]")
            elif t not in known:
                other = next(iter(known))
                self.emit(f"{arg.name}_{t} = {arg.name}_{other}.view({t.upper()})")
                known.add(t)
            return f"flushed({arg.name}_{t})" if self.ftz and t == "f4" else f"{arg.name}_{t}"
        if isinstance(arg, Imm):
            return self.program.constant(arg.bits, arg.kind, t)
        if isinstance(arg, Not):
            return f"(~{self.get(arg.reg, 'b')})"
        if isinstance(arg, Special):
            name = "S_" + arg.name.replace(".", "_")
            varying = arg.name.partition(".")[0] in ("tid", "ctaid", "warpid", "cluster_ctaid", "clusterid")
            value = f"{name}[i]" if varying else name
            return value if t == "u4" else f"{value}.astype({t.upper()})" if WIDTH[t] != 4 else f"{value}.view({t.upper()})"
        if isinstance(arg, Sym):
            if arg.name in ("WARP_SZ",):
                return self.program.constant(32, "int", t)
            return f"M.symbol({arg.name!r}, {t.upper()})"
        if isinstance(arg, Sink):
            return self.program.constant(0, "int", t)
        raise Unsupported(f"operand {arg}")

    def resized(self, reg: Reg, t: str) -> str:
        """A register wider or narrower than the instruction's type: truncated or zero-extended."""
        own = f"u{reg.size}"
        low = self.get(reg, own)
        if t[0] == "f":
            raise Unsupported(f"{reg.name} as {t}")
        self.temp += 1
        name = f"t{self.temp}"
        self.emit(f"{name} = {low}.astype({t.upper()})")
        return name

    def put(self, arg, t: str, expr: str, fresh: bool = True) -> None:
        """arg = expr of type t; ``fresh``: it is not a view of a register's array."""
        if isinstance(arg, Vec):
            (arg,) = arg.items
        if isinstance(arg, Sink):
            self.emit(expr) if "(" in expr and "M." in expr else None
            return
        if arg.pred:
            t = "b"
        elif WIDTH[t] != arg.size:
            wide = f"{t[0]}{arg.size}" if t[0] in "iu" else None
            if wide is None:
                raise Unsupported(f"{t} into {arg}")
            expr, t = f"({expr}).astype({wide.upper()})", wide
        if self.ftz and t == "f4":
            expr = f"flushed({expr})"
        if self.guard:
            old = self.get(arg, t)
            expr = f"np.where({self.guard}, {expr}, {old})"
            fresh = True
        if not fresh:
            expr = f"({expr}).copy()"
        self.emit(f"{arg.name}_{t} = {expr}")
        self.versions[arg.name] += 1
        self.typed_views[arg.name] = {t}
        self.loaded.discard(arg.name)
        self.dirty[arg.name] = arg

    def mask(self) -> str:
        if self.masked:
            return f"(k & {self.guard})" if self.guard else "k"
        return self.guard or "None"

    def address(self, mem: Mem, t: str) -> str:
        base = mem.base
        if isinstance(base, Sym):
            return f"M.symbol({base.name!r}, {t.upper()}, {mem.offset})"
        if isinstance(base, Imm):
            return self.program.constant(base.bits + mem.offset, "int", t)
        value = self.get(base, t)
        return f"({value} + {self.program.constant(mem.offset, 'int', t)})" if mem.offset else value

    def set_guard(self, instr: Instr) -> None:
        self.guard = None
        if instr.guard:
            name = self.get(instr.guard, "b")
            self.guard = f"(~{name})" if instr.negated else name

    def emit_instr(self, instr: Instr) -> None:
        self.begin(instr)
        getattr(self, "op_" + instr.parts[0])(instr, instr.parts[1:], instr.args)

    def begin(self, instr: Instr) -> None:
        self.instr, self.ftz = instr, "ftz" in instr.parts
        self.set_guard(instr)
        if instr.parts[0] == "wgmma":
            self.flush_accesses()
            self.fenced = instr.parts[1] == "fence" or self.fenced and instr.parts[1] == "mma_async"
        elif self.program.wgmma_registers:
            self.record_access(instr)

    def record_access(self, instr: Instr) -> None:
        """Record accesses to registers of wgmma.

        Those between a wgmma.fence and the end of its group in one block need no other fence: PTX registers are virtual,
        LLVM moves copies and arithmetic there (Triton's fence does not prevent it), and ptxas emits a WARPGROUP.ARRIVE after
        them, before each wgmma if needed. They must still not access registers of a wgmma in flight.
        """
        known = self.program.wgmma_registers
        found = [known[r.name] for part in reads_and_writes(instr) for r in part if r.name in known]
        if found and not self.accessed:
            self.accessing_instr = instr.number
        self.accessed |= dict.fromkeys(found)

    def flush_accesses(self) -> None:
        if self.accessed:
            registers = indices(sorted(self.accessed))
            self.emit(f"M.access_wgmma_registers(i, {registers}, {self.accessing_instr}, {self.fenced})")
            self.accessed = {}

    def type_of(self, mods) -> str:
        for mod in reversed(mods):
            if mod in TYPES:
                return mod
        raise Unsupported(f"no type in {self.instr.text!r}")
