"""PTX instructions to Python source over numpy arrays.

A kernel is cut into blocks. A block becomes a function of the warps that execute it together: ``i`` selects them (a slice
or an index array), ``k`` is None or the mask (warps, 32) of lanes. Registers that live in one block only are local
variables; the others are arrays (all warps, 32), written back at the block's end. Every register may exist in several
typed views (u4, i4, f4, ...) of the same bits.
"""

from dataclasses import dataclass, field

import numpy as np

from .ptx import Imm, Instr, Kernel, Mem, Not, Reg, Sink, Special, Sym, Vec

TYPES = {"u8": "u1", "s8": "i1", "b8": "u1", "u16": "u2", "s16": "i2", "b16": "u2", "f16": "f2", "bf16": "u2", "u32": "u4",
         "s32": "i4", "b32": "u4", "f32": "f4", "u64": "u8", "s64": "i8", "b64": "u8", "f64": "f8", "pred": "b",
         "f16x2": "u4", "bf16x2": "u4", "s16x2": "u4", "u16x2": "u4"}
WIDTH = {"u1": 1, "i1": 1, "u2": 2, "i2": 2, "f2": 2, "u4": 4, "i4": 4, "f4": 4, "u8": 8, "i8": 8, "f8": 8}
BLOCKING = ("bar", "barrier")
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
FLIPPED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}  # unordered: not the opposite


def blocking(instr: Instr) -> bool:
    root = instr.parts[0]
    if root in ("bar", "barrier"):
        return instr.parts[1] != "warp"
    return root == "mbarrier" and instr.parts[1] in ("try_wait", "test_wait")


class Unsupported(Exception):
    """An instruction or a form of it that nobody has taught the emulator."""


@dataclass
class Block:
    index: int
    instrs: list[Instr] = field(default_factory=list)
    end: Instr | None = None  # bra, ret, or a blocking instruction
    target: int = -1
    labels: list[str] = field(default_factory=list)
    sources: dict = field(default_factory=dict)  # masked -> code object


def cut(kernel: Kernel) -> list[Block]:
    blocks, labels = [Block(0)], {}

    def new():
        block = blocks[-1]
        if block.instrs or block.end or block.labels:
            blocks.append(Block(len(blocks)))
        return blocks[-1]

    for item in kernel.code:
        if isinstance(item, str):
            if blocks[-1].instrs or blocks[-1].end:
                new()
            labels[item] = blocks[-1].index
            blocks[-1].labels.append(item)
            continue
        if blocks[-1].end:
            new()
        root = item.parts[0]
        if root in ("bra", "ret", "exit", "trap"):
            blocks[-1].end = item
        elif blocking(item):
            if blocks[-1].instrs or blocks[-1].labels:
                blocks.append(Block(len(blocks)))
            blocks[-1].end = item
        else:
            blocks[-1].instrs.append(item)
    for block in blocks:
        if block.end and block.end.parts[0] == "bra":
            block.target = labels[block.end.args[0].name]
    return blocks


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


NO_DEST = ("st", "red", "cp", "bar", "barrier", "bra", "ret", "exit", "mbarrier", "fence", "membar", "wgmma", "setmaxnreg",
           "prefetch", "prefetchu", "stmatrix", "trap", "tensormap", "griddepcontrol", "nanosleep", "discard", "applypriority")


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


class Program:
    """A kernel's blocks, and what their sources need: constants, arrays of registers."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.blocks = cut(kernel)
        self.constants: dict[tuple, str] = {}
        self.values: dict[str, np.ndarray] = {}
        self.instrs = [item for item in kernel.code if isinstance(item, Instr)]
        self.async_regs = {r.name for x in self.instrs if x.op.startswith("wgmma.mma_async") for r in registers(x.args[0])}
        self.lasting = set(self.async_regs)
        self.pools: dict[tuple[str, ...], int] = {}
        for x in self.instrs:
            if x.op.startswith("wgmma.mma_async"):
                self.pools.setdefault(tuple(r.name for r in registers(x.args[0])), len(self.pools))
        if sum(map(len, self.pools)) != len(self.async_regs):
            raise Unsupported(f"{kernel.name}: sums of wgmma that share some registers and not others")
        for block in self.blocks:
            seen = set()
            for instr in [*block.instrs, *([block.end] if block.end else [])]:
                reads, writes = reads_and_writes(instr)
                self.lasting |= {r.name for r in reads if r.name not in seen}
                seen |= {r.name for r in writes}
                if instr is block.end:
                    self.lasting |= {r.name for r in writes}  # written by the machine

    def sums(self, names: tuple[str, ...]) -> str:
        """The name of a wgmma's sums: one array (registers, warps, 32) that holds all of them."""
        return f"D_{self.pools[names]}"

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
                raw = (bits & (256 ** width - 1)).to_bytes(width, "little")
                value = np.frombuffer(raw, dtype="<" + t).reshape(1, 1)
            self.values[name] = value
        return self.constants[key]

    def code(self, block: Block, masked: bool):
        key = masked
        if key not in block.sources:
            source = BlockSource(self, block, masked).source()
            block.sources[key] = compile(source, f"<{self.kernel.name} block {block.index}{' masked' if masked else ''}>", "exec")
            block.text = source
        return block.sources[key]


class BlockSource:
    def __init__(self, program: Program, block: Block, masked: bool):
        self.program, self.block, self.masked = program, block, masked
        self.lines: list[str] = []
        self.have: dict[str, set] = {}
        self.loaded: set[str] = set()
        self.dirty: dict[str, Reg] = {}
        self.guard: str | None = None
        self.temp = 0
        self.instr: Instr | None = None

    def source(self) -> str:
        for instr in self.block.instrs:
            self.one(instr)
        end, returned = self.block.end, "None"
        if end:
            self.instr = end
            self.set_guard(end)
            root = end.parts[0]
            if root in ("bra", "ret", "exit", "trap"):
                returned = self.guard or "None"
            elif root in ("bar", "barrier"):
                args = [self.get(a, "u4") for a in end.args]
                returned = f"({', '.join(args)},)"
            else:
                returned = f"({self.address(end.args[1], 'u4')}, {self.get(end.args[2], 'u4')})"
        self.flush()
        body = "\n ".join([*self.lines, f"return {returned}"])
        return f"def f(i, k):\n {body}\n"

    def emit(self, line: str) -> None:
        self.lines.append(line)

    def flush(self, only=None) -> None:
        for name, reg in list(self.dirty.items()):
            if name in self.program.lasting and (only is None or name in only):
                t = self.any_variant(reg)
                target = f"V_{name}_{t}"
                self.emit(f"P({target}, i, k, {name}_{t})" if self.masked else f"{target}[i] = {name}_{t}")
                del self.dirty[name]

    def any_variant(self, reg: Reg) -> str:
        return next(iter(self.have[reg.name]))

    def forget(self, names) -> None:
        for name in names:
            self.have.pop(name, None)
            self.loaded.discard(name)

    # ---- operands
    def get(self, arg, t: str) -> str:
        if isinstance(arg, Reg):
            if arg.pred:
                t = "b"
            elif WIDTH[t] != arg.size:
                return self.resized(arg, t)
            known = self.have.get(arg.name)
            if known is None:
                self.have[arg.name] = {t}
                self.loaded.add(arg.name)
                self.emit(f"{arg.name}_{t} = V_{arg.name}_{t}[i]")
            elif t not in known:
                other = next(iter(known))
                self.emit(f"{arg.name}_{t} = {arg.name}_{other}.view({t.upper()})")
                known.add(t)
            return f"{arg.name}_{t}"
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
        """A register wider or narrower than the instruction's type: its low bytes, or zeros above them."""
        own = f"u{reg.size}"
        low = self.get(reg, own)
        if t[0] == "f":
            raise Unsupported(f"{reg.name} as {t}")
        self.temp += 1
        name = f"t{self.temp}"
        self.emit(f"{name} = {low}.astype({t.upper()})")
        return name

    def put(self, arg, t: str, expr: str, fresh: bool = True) -> None:
        """arg = expr, which is of type t; ``fresh``: no view of a register's array."""
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
        if self.guard:
            old = self.get(arg, t)
            expr = f"np.where({self.guard}, {expr}, {old})"
            fresh = True
        if not fresh:
            expr = f"({expr}).copy()"
        self.emit(f"{arg.name}_{t} = {expr}")
        self.have[arg.name] = {t}
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

    # ---- instructions
    def one(self, instr: Instr) -> None:
        self.instr = instr
        self.set_guard(instr)
        root = instr.parts[0]
        method = getattr(self, "op_" + root, None)
        if method is None:
            raise Unsupported(f"{instr.op} in {instr.text!r}")
        method(instr, instr.parts[1:], instr.args)

    def type_of(self, mods) -> str:
        for mod in reversed(mods):
            if mod in TYPES:
                return mod
        raise Unsupported(f"no type in {self.instr.text!r}")

    def binary(self, instr, mods, args, operator: str) -> None:
        kind = self.type_of(mods)
        if kind in ("f16x2", "bf16x2", "bf16", "f16"):
            helper = {"+": "add", "-": "sub", "*": "mul"}[operator]
            t = TYPES[kind] if kind != "f16" else "u2"
            return self.put(args[0], t, f"packed_{helper}({self.get(args[1], t)}, {self.get(args[2], t)}, {kind!r})")
        t = TYPES[kind]
        if kind in ("s16x2", "u16x2"):
            return self.put(args[0], t, f"packed_int_add({self.get(args[1], t)}, {self.get(args[2], t)})")  # add alone has it
        if t[0] == "i":
            t = "u" + t[1:]  # the same bits
        a, b = self.get(args[1], t), self.get(args[2], t)
        self.put(args[0], t, f"{a} {operator} {b}")

    def op_add(self, instr, mods, args):
        if "cc" in mods:
            raise Unsupported(instr.text)
        self.binary(instr, mods, args, "+")

    def op_sub(self, instr, mods, args):
        self.binary(instr, mods, args, "-")

    def op_mul(self, instr, mods, args):
        kind = self.type_of(mods)
        t = TYPES[kind]
        if "wide" in mods:
            wide = f"{t[0]}{2 * WIDTH[t]}"
            a, b = self.get(args[1], t), self.get(args[2], t)
            return self.put(args[0], wide, f"{a}.astype({wide.upper()}) * {b}.astype({wide.upper()})")
        if "hi" in mods:
            return self.put(args[0], t, f"mul_hi({self.get(args[1], t)}, {self.get(args[2], t)})")
        self.binary(instr, mods, args, "*")

    def op_mad(self, instr, mods, args):
        t = TYPES[self.type_of(mods)]
        a, b = self.get(args[1], t), self.get(args[2], t)
        if "wide" in mods:
            wide = f"{t[0]}{2 * WIDTH[t]}"
            return self.put(args[0], wide, f"{a}.astype({wide.upper()}) * {b}.astype({wide.upper()}) + {self.get(args[3], wide)}")
        if "hi" in mods:
            return self.put(args[0], t, f"mul_hi({a}, {b}) + {self.get(args[3], t)}")
        if t[0] == "f":
            return self.op_fma(instr, mods, args)
        self.put(args[0], t, f"{a} * {b} + {self.get(args[3], t)}")

    def op_fma(self, instr, mods, args):
        kind = self.type_of(mods)
        if kind == "f32":
            a, b, c = (self.get(arg, "f4") for arg in args[1:4])
            self.put(args[0], "f4", f"fma32({a}, {b}, {c})")
        elif kind == "f64":
            a, b, c = (self.get(arg, "f8") for arg in args[1:4])
            self.put(args[0], "f8", f"{a} * {b} + {c}")
        else:
            t = "u2" if kind in ("f16", "bf16") else "u4"
            a, b, c = (self.get(arg, t) for arg in args[1:4])
            self.put(args[0], t, f"packed_fma({a}, {b}, {c}, {kind!r}, {'relu' in mods})")

    def op_div(self, instr, mods, args):
        t = TYPES[self.type_of(mods)]
        a, b = self.get(args[1], t), self.get(args[2], t)
        self.put(args[0], t, f"{a} / {b}" if t[0] == "f" else f"int_div({a}, {b})")

    def op_rem(self, instr, mods, args):
        t = TYPES[self.type_of(mods)]
        self.put(args[0], t, f"int_rem({self.get(args[1], t)}, {self.get(args[2], t)})")

    def minmax(self, instr, mods, args, name):
        kind = self.type_of(mods)
        if kind in ("f16x2", "bf16x2", "bf16", "f16"):
            t = TYPES[kind] if kind != "f16" else "u2"
            return self.put(args[0], t, f"packed_{name}({self.get(args[1], t)}, {self.get(args[2], t)}, {kind!r}, {'NaN' in mods})")
        t = TYPES[kind]
        function = f"np.{name}imum" if t[0] != "f" or "NaN" in mods else f"np.f{name}"
        found = f"{function}({self.get(args[1], t)}, {self.get(args[2], t)})"
        for more in args[3:]:
            found = f"{function}({found}, {self.get(more, t)})"
        self.put(args[0], t, found)

    def op_min(self, instr, mods, args):
        self.minmax(instr, mods, args, "min")

    def op_max(self, instr, mods, args):
        self.minmax(instr, mods, args, "max")

    def op_neg(self, instr, mods, args):
        kind = self.type_of(mods)
        if kind in ("f16x2", "bf16x2", "bf16", "f16"):
            t = "u2" if kind in ("f16", "bf16") else "u4"
            sign = self.program.constant(0x8000 if t == "u2" else 0x80008000, "int", t)
            return self.put(args[0], t, f"{self.get(args[1], t)} ^ {sign}")
        t = TYPES[kind]
        self.put(args[0], t, f"-{self.get(args[1], t)}")

    def op_abs(self, instr, mods, args):
        kind = self.type_of(mods)
        if kind in ("f16x2", "bf16x2", "bf16", "f16"):
            t = "u2" if kind in ("f16", "bf16") else "u4"
            rest = self.program.constant(0x7FFF if t == "u2" else 0x7FFF7FFF, "int", t)
            return self.put(args[0], t, f"{self.get(args[1], t)} & {rest}")
        t = TYPES[kind]
        self.put(args[0], t, f"np.abs({self.get(args[1], t)})")

    def logic(self, instr, mods, args, operator):
        t = TYPES[self.type_of(mods)]
        self.put(args[0], t, f"{self.get(args[1], t)} {operator} {self.get(args[2], t)}")

    def op_and(self, instr, mods, args):
        self.logic(instr, mods, args, "&")

    def op_or(self, instr, mods, args):
        self.logic(instr, mods, args, "|")

    def op_xor(self, instr, mods, args):
        self.logic(instr, mods, args, "^")

    def op_not(self, instr, mods, args):
        t = TYPES[self.type_of(mods)]
        self.put(args[0], t, f"~{self.get(args[1], t)}")

    def op_lop3(self, instr, mods, args):
        table = args[4].bits
        a, b, c = (self.get(arg, "u4") for arg in args[1:4])
        terms = []
        for row in range(8):
            if table >> row & 1:
                terms.append(" & ".join(f"{'' if row >> (2 - at) & 1 else '~'}{x}" for at, x in enumerate((a, b, c))))
        self.put(args[0], "u4", " | ".join(f"({term})" for term in terms) or self.program.constant(0, "int", "u4"))

    def shift(self, instr, mods, args, left):
        t = TYPES[self.type_of(mods)]
        bits = 8 * WIDTH[t]
        if isinstance(args[2], Imm):
            amount = args[2].bits
            if amount >= bits:
                if left or t[0] == "u":
                    return self.put(args[0], t, f"{self.get(args[1], t)} * {self.program.constant(0, 'int', t)}")
                amount = bits - 1
            by = self.program.constant(amount, "int", t)
            return self.put(args[0], t, f"{self.get(args[1], t)} {'<<' if left else '>>'} {by}")
        self.put(args[0], t, f"shifted({self.get(args[1], t)}, {self.get(args[2], 'u4')}, {left}, {t.upper()})")

    def op_shl(self, instr, mods, args):
        self.shift(instr, mods, args, True)

    def op_shr(self, instr, mods, args):
        self.shift(instr, mods, args, False)

    def op_shf(self, instr, mods, args):
        a, b, c = (self.get(arg, "u4") for arg in args[1:4])
        self.put(args[0], "u4", f"funnel({a}, {b}, {c}, {mods[0] == 'l'}, {'wrap' in mods})")

    def op_bfe(self, instr, mods, args):
        t = TYPES[self.type_of(mods)]
        self.put(args[0], t, f"bit_field({self.get(args[1], t)}, {self.get(args[2], 'u4')}, {self.get(args[3], 'u4')})")

    def op_bfi(self, instr, mods, args):
        t = TYPES[self.type_of(mods)]
        a, b = self.get(args[1], t), self.get(args[2], t)
        self.put(args[0], t, f"bit_insert({a}, {b}, {self.get(args[3], 'u4')}, {self.get(args[4], 'u4')})")

    def op_prmt(self, instr, mods, args):
        if len(mods) > 1:
            raise Unsupported(instr.text)
        a, b, c = (self.get(arg, "u4") for arg in args[1:4])
        self.put(args[0], "u4", f"permuted({a}, {b}, {c})")

    def op_popc(self, instr, mods, args):
        t = TYPES[self.type_of(mods)]
        self.put(args[0], "u4", f"np.bitwise_count({self.get(args[1], t)}).astype(U4)")

    def op_clz(self, instr, mods, args):
        self.put(args[0], "u4", f"leading_zeros({self.get(args[1], TYPES[self.type_of(mods)])})")

    def op_brev(self, instr, mods, args):
        self.put(args[0], "u4", f"reversed_bits({self.get(args[1], 'u4')})")

    def op_mov(self, instr, mods, args):
        kind = self.type_of(mods)
        to, source = args
        if isinstance(source, Vec):
            t = TYPES[kind]
            part = f"u{WIDTH[t] // len(source.items)}"
            bits = 8 * WIDTH[part]
            parts = [f"{self.get(item, part)}.astype({t.upper()})" for item in source.items]
            joined = " | ".join([parts[0], *(f"({p} << {self.program.constant(bits * at, 'int', t)})"
                                             for at, p in enumerate(parts) if at)])
            return self.put(to, t, joined)
        if isinstance(to, Vec):
            t = TYPES[kind]
            part = f"u{WIDTH[t] // len(to.items)}"
            bits = 8 * WIDTH[part]
            whole = self.get(source, t)
            for at, item in enumerate(to.items):
                shifted = f"({whole} >> {self.program.constant(bits * at, 'int', t)})" if at else whole
                if not isinstance(item, Sink):
                    self.put(item, part, f"{shifted}.astype({part.upper()})")
            return None
        t = TYPES[kind]
        if isinstance(source, Reg) and not source.pred and source.name in self.have:
            t = next(iter(self.have[source.name]))
        fresh = not isinstance(source, (Reg, Special)) or isinstance(source, Reg) and source.name in self.have \
            and source.name not in self.loaded
        if isinstance(source, Reg):
            value = self.get(source, t)
            fresh = fresh and source.name not in self.loaded
        else:
            value = self.get(source, t)
        self.put(to, t, value, fresh)

    def op_cvta(self, instr, mods, args):
        if "param" in mods:
            return self.put(args[0], "u8", f"M.param_address({args[1].name!r})" if isinstance(args[1], Sym)
                            else f"M.generic_param({self.get(args[1], 'u8')})", False)
        space = next(m for m in mods if m in ("global", "shared", "local", "const", "param"))
        t = TYPES[self.type_of(mods)]
        value = self.get(args[1], t)
        if space in ("shared", "local"):
            self.put(args[0], t, f"{value} {'-' if 'to' in mods else '+'} {'SHARED_WINDOW' if space == 'shared' else 'LOCAL_WINDOW'}")
        else:
            self.put(args[0], t, value, False)

    def op_isspacep(self, instr, mods, args):
        raise Unsupported(instr.text)

    def op_setp(self, instr, mods, args):
        kind = self.type_of(mods)
        t = TYPES[kind]
        if kind in ("f16", "bf16"):
            a, b = (f"half_to_float({self.get(x, 'u2')}, {kind!r})" for x in args[1:3])
        else:
            a, b = self.get(args[1], t), self.get(args[2], t)
        name = mods[0]
        if name in FLIPPED:
            found = f"~({a} {FLIPPED[name]} {b})" if name not in ("equ", "neu") else (
                f"~({a} < {b}) & ~({a} > {b})" if name == "equ" else f"~({a} == {b})")
        elif name in ("nan", "num"):
            found = f"(({a} != {a}) | ({b} != {b}))"
            found = f"~{found}" if name == "num" else found
        elif name == "ne" and t[0] == "f":
            found = f"({a} < {b}) | ({a} > {b})"
        else:
            found = f"{a} {COMPARE[name]} {b}"
        if mods[1] in ("and", "or", "xor"):
            c = self.get(args[3], "b")
            found = f"({found}) {dict([('and', '&'), ('or', '|'), ('xor', '^')])[mods[1]]} {c}"
        if isinstance(args[0], Vec):
            p, q = args[0].items
            self.put(p, "b", found)
            if not isinstance(q, Sink):
                if mods[1] in ("and", "or", "xor"):
                    raise Unsupported(instr.text)
                self.put(q, "b", f"~{self.get(p, 'b')}")
        else:
            self.put(args[0], "b", found)

    def op_set(self, instr, mods, args):
        raise Unsupported(instr.text)

    def op_selp(self, instr, mods, args):
        t = TYPES[self.type_of(mods)]
        self.put(args[0], t, f"np.where({self.get(args[3], 'b')}, {self.get(args[1], t)}, {self.get(args[2], t)})")

    def unary(self, instr, mods, args, expr):
        kind = self.type_of(mods)
        if kind in ("f16", "bf16", "f16x2", "bf16x2"):
            t = "u2" if kind in ("f16", "bf16") else "u4"
            return self.put(args[0], t, f"packed_unary({self.get(args[1], t)}, lambda x: {expr.format('x')}, {kind!r})")
        t = TYPES[kind]
        self.put(args[0], t, expr.format(self.get(args[1], t)))

    def op_ex2(self, instr, mods, args):
        self.unary(instr, mods, args, "np.exp2({})")

    def op_lg2(self, instr, mods, args):
        self.unary(instr, mods, args, "np.log2({})")

    def op_rcp(self, instr, mods, args):
        self.unary(instr, mods, args, "1 / {}")

    def op_sqrt(self, instr, mods, args):
        self.unary(instr, mods, args, "np.sqrt({})")

    def op_rsqrt(self, instr, mods, args):
        self.unary(instr, mods, args, "1 / np.sqrt({})")

    def op_sin(self, instr, mods, args):
        self.unary(instr, mods, args, "np.sin({})")

    def op_cos(self, instr, mods, args):
        self.unary(instr, mods, args, "np.cos({})")

    def op_tanh(self, instr, mods, args):
        self.unary(instr, mods, args, "np.tanh({})")

    def op_cvt(self, instr, mods, args):
        kinds = [m for m in mods if m in TYPES or m in ("tf32", "e4m3x2", "e5m2x2")]
        to, source = kinds[0], kinds[1]
        rounding = next((m for m in mods if m in ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")), "")
        sat = "sat" in mods or "satfinite" in mods
        if "relu" in mods:
            raise Unsupported(instr.text)
        if to in ("bf16x2", "f16x2"):
            hi, lo = self.get(args[1], "f4"), self.get(args[2], "f4")
            return self.put(args[0], "u4", f"pack2({hi}, {lo}, {to!r}, {rounding!r})")
        if to == "tf32":
            return self.put(args[0], "u4", f"to_tf32({self.get(args[1], 'u4')}, {rounding!r})")
        if to in ("bf16", "f16") and source == "f32":
            return self.put(args[0], "u2", f"from_float({self.get(args[1], 'f4')}, {to!r}, {rounding!r})")
        if source in ("bf16", "f16"):
            wide = f"half_to_float({self.get(args[1], 'u2')}, {source!r})"
            if to == "f32":
                return self.put(args[0], "f4", wide)
            if to in ("bf16", "f16"):
                return self.put(args[0], "u2", f"from_float({wide}, {to!r}, 'rn')")
            return self.put(args[0], TYPES[to], f"float_to_int({wide}, {TYPES[to].upper()}, {rounding!r})")
        if to in ("bf16", "f16"):
            return self.put(args[0], "u2", f"from_float({self.get(args[1], TYPES[source])}.astype(F4), {to!r}, 'rn')")
        a, t, s = args[1], TYPES[to], TYPES[source]
        if t[0] == "f" and s[0] == "f":
            value = self.get(a, s)
            if t == s:
                function = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil", "": ""}[rounding]
                value = f"{function}({value})"
            else:
                value = f"{value}.astype({t.upper()})"
            return self.put(args[0], t, f"np.clip({value}, 0, 1)" if sat else value)
        if s[0] == "f":
            return self.put(args[0], t, f"float_to_int({self.get(a, s)}, {t.upper()}, {rounding!r})")
        if t[0] == "f":
            return self.put(args[0], t, f"{self.get(a, s)}.astype({t.upper()})")
        if sat:
            raise Unsupported(instr.text)
        return self.put(args[0], t, f"{self.get(a, s)}.astype({t.upper()})")

    # ---- memory
    def op_ld(self, instr, mods, args):
        kind = self.type_of(mods)
        t = TYPES[kind]
        count = next((int(m[1:]) for m in mods if m in ("v2", "v4", "v8")), 1)
        space = next((m for m in mods if m in ("global", "shared", "param", "local", "const") or m.startswith("shared::")), "generic")
        space = space.partition("::")[0]
        mem = args[1]
        where = instr.number
        if space == "param":
            name = f"M.param({mem.base.name!r}, {mem.offset}, {t!r}, {count})" if isinstance(mem.base, Sym) else \
                f"M.ld('global', i, {self.mask()}, {self.address(mem, 'u8')}, {t.upper()}, {count}, {where})"
        else:
            wide = "u8" if space in ("global", "generic", "const") or isinstance(mem.base, Reg) and mem.base.size == 8 else "u4"
            name = f"M.ld({space!r}, i, {self.mask()}, {self.address(mem, wide)}, {t.upper()}, {count}, {where})"
        if count == 1:
            return self.put(args[0], t, name)
        self.temp += 1
        temp = f"t{self.temp}"
        self.emit(f"{temp} = {name}")
        for at, item in enumerate(args[0].items):
            if not isinstance(item, Sink):
                self.put(item, t, f"{temp}[..., {at}]")
        return None

    op_ldu = op_ld

    def op_st(self, instr, mods, args):
        kind = self.type_of(mods)
        t = TYPES[kind]
        space = next((m for m in mods if m in ("global", "shared", "local") or m.startswith("shared::")), "generic").partition("::")[0]
        items = args[1].items if isinstance(args[1], Vec) else (args[1],)
        values = ", ".join(self.get(item, t) for item in items)
        base = args[0].base
        wide = "u8" if space in ("global", "generic") or isinstance(base, Reg) and base.size == 8 else "u4"
        self.emit(f"M.st({space!r}, i, {self.mask()}, {self.address(args[0], wide)}, ({values},), {t.upper()}, {instr.number})")

    def op_atom(self, instr, mods, args):
        self.atomic(instr, mods, args[0], args[1], args[2:])

    def op_red(self, instr, mods, args):
        self.atomic(instr, mods, None, args[0], args[1:])

    def atomic(self, instr, mods, to, mem, values):
        kind = self.type_of(mods)
        if kind in ("f16", "bf16", "f16x2", "bf16x2"):
            raise Unsupported(instr.text)
        t = TYPES[kind]
        space = "shared" if any(m.startswith("shared") for m in mods) else "global"
        operation = next(m for m in mods if m in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"))
        given = ", ".join(self.get(v, t) for v in values)
        call = (f"M.atomic({space!r}, {operation!r}, i, {self.mask()}, "
                f"{self.address(mem, 'u8' if space == 'global' else 'u4')}, ({given},), {t.upper()}, {instr.number}, {to is not None})")
        if to is None or isinstance(to, Sink):
            self.emit(call)
        else:
            self.put(to, t, call)

    def op_ldmatrix(self, instr, mods, args):
        count = next(int(m[1:]) for m in mods if m in ("x1", "x2", "x4"))
        self.temp += 1
        self.emit(f"t{self.temp} = M.ldmatrix(i, {self.mask()}, {self.address(args[1], 'u4')}, {count}, {'trans' in mods}, {instr.number})")
        items = args[0].items if isinstance(args[0], Vec) else (args[0],)
        for at, item in enumerate(items):
            self.put(item, "u4", f"t{self.temp}[{at}]")

    def op_stmatrix(self, instr, mods, args):
        count = next(int(m[1:]) for m in mods if m in ("x1", "x2", "x4"))
        items = args[1].items if isinstance(args[1], Vec) else (args[1],)
        values = ", ".join(self.get(item, "u4") for item in items)
        self.emit(f"M.stmatrix(i, {self.mask()}, {self.address(args[0], 'u4')}, ({values},), {count}, {'trans' in mods}, {instr.number})")

    def op_mma(self, instr, mods, args):
        shape = next(m for m in mods if m.startswith("m") and "n" in m[1:] and "k" in m)
        kinds = [m for m in mods if m in TYPES or m == "tf32"]  # d, a, b, c
        a = ", ".join(self.get(x, "u4") for x in args[1].items)
        b = ", ".join(self.get(x, "u4") for x in (args[2].items if isinstance(args[2], Vec) else (args[2],)))
        if kinds[0] != "f32":
            raise Unsupported(instr.text)
        c = ", ".join(self.get(x, "f4") for x in args[3].items)
        self.temp += 1
        self.emit(f"t{self.temp} = M.mma({shape!r}, {kinds[1]!r}, ({a},), ({b},), ({c},), i, {self.mask()}, {instr.number})")
        for at, item in enumerate(args[0].items):
            self.put(item, "f4", f"t{self.temp}[..., {at}]")

    # ---- lanes
    def members(self, arg) -> str:
        if self.masked:
            self.emit(f"M.converged(i, k, {self.get(arg, 'u4')}, {self.instr.number})")
        return ""

    def op_shfl(self, instr, mods, args):
        self.members(args[4])
        to, p = (args[0].items if isinstance(args[0], Vec) else (args[0], None))
        value = self.get(args[1], "u4")
        self.temp += 1
        self.emit(f"t{self.temp} = M.shuffle({mods[1]!r}, i, {value}, {self.get(args[2], 'u4')}, {self.get(args[3], 'u4')})")
        if not isinstance(to, Sink):
            self.put(to, "u4", f"t{self.temp}[0]")
        if p is not None and not isinstance(p, Sink):
            self.put(p, "b", f"t{self.temp}[1]")

    def op_vote(self, instr, mods, args):
        self.members(args[2])
        t = "u4" if "ballot" in mods else "b"
        self.put(args[0], t, f"M.vote({mods[1]!r}, i, {self.mask()}, {self.get(args[1], 'b')}, {self.get(args[2], 'u4')})")

    def op_redux(self, instr, mods, args):
        self.members(args[2])
        t = TYPES[self.type_of(mods)]
        operation = next(m for m in mods if m in ("add", "min", "max", "and", "or", "xor"))
        self.put(args[0], t, f"M.redux({operation!r}, i, {self.mask()}, {self.get(args[1], t)}, {self.get(args[2], 'u4')})")

    def op_elect(self, instr, mods, args):
        self.members(args[1])
        to, p = args[0].items
        self.put(p, "b", f"M.elect(i, {self.mask()})")

    def op_activemask(self, instr, mods, args):
        self.put(args[0], "u4", f"M.activemask(i, {self.mask()})")

    # ---- copies, barriers, products: by the machine
    def op_bar(self, instr, mods, args):  # bar.warp.sync
        self.members(args[0])
        self.emit(f"M.warp_barrier(i, {self.mask()})")

    def op_cp(self, instr, mods, args):
        rest = ".".join(mods)
        mask = self.mask()
        if rest.startswith("async.bulk"):
            if "commit_group" in rest:
                return self.emit(f"M.bulk_commit(i, {mask})")
            if "wait_group" in rest:
                return self.emit(f"M.bulk_wait(i, {mask}, {args[0].bits}, {'read' in mods}, {instr.number})")
            if "tensor" in mods:
                load = mods[3].startswith("shared") if mods[2] == "tensor" else False
                first = args[0]
                if load or "complete_tx::bytes" in rest:
                    coords = ", ".join(self.get(c, "i4") for c in args[1].coords)
                    return self.emit(f"M.tma_load(i, {mask}, {self.address(first, 'u4')}, {self.address(args[1], 'u8')}, "
                                     f"({coords},), {self.address(args[2], 'u4')}, {instr.number})")
                coords = ", ".join(self.get(c, "i4") for c in first.coords)
                return self.emit(f"M.tma_store(i, {mask}, {self.address(first, 'u8')}, ({coords},), "
                                 f"{self.address(args[1], 'u4')}, {instr.number})")
            raise Unsupported(instr.text)
        if rest.startswith("async.mbarrier"):
            return self.emit(f"M.async_arrive(i, {mask}, {self.address(args[0], 'u4')}, {'noinc' in mods}, {instr.number})")
        if "commit_group" in mods:
            return self.emit(f"M.async_commit(i, {mask})")
        if "wait_group" in mods:
            return self.emit(f"M.async_wait(i, {mask}, {args[0].bits}, {instr.number})")
        if "wait_all" in mods:
            return self.emit(f"M.async_wait(i, {mask}, 0, {instr.number}, True)")
        if rest.startswith("async.c"):
            given = self.get(args[3], "u4") if len(args) > 3 and isinstance(args[3], (Reg, Imm)) else self.program.constant(args[2].bits, "int", "u4")
            return self.emit(f"M.async_copy(i, {mask}, {self.address(args[0], 'u4')}, {self.address(args[1], 'u8')}, "
                             f"{args[2].bits}, {given}, {instr.number})")
        raise Unsupported(instr.text)

    def op_mbarrier(self, instr, mods, args):
        mask = self.mask()
        what = mods[0]
        if what == "init":
            return self.emit(f"M.mbarrier_init(i, {mask}, {self.address(args[0], 'u4')}, {self.get(args[1], 'u4')}, {instr.number})")
        if what == "inval":
            return self.emit(f"M.mbarrier_inval(i, {mask}, {self.address(args[0], 'u4')}, {instr.number})")
        if what in ("arrive", "expect_tx"):
            rest = args if isinstance(args[0], Mem) else args[1:]
            if not isinstance(args[0], (Mem, Sink)):
                raise Unsupported(f"{instr.text}: the state is not kept")
            expect = "expect_tx" in mods
            value = self.get(rest[1], "u4") if len(rest) > 1 else "None"
            return self.emit(f"M.mbarrier_arrive(i, {mask}, {self.address(rest[0], 'u4')}, {'None' if expect else value}, "
                             f"{value if expect else 'None'}, {what == 'arrive'}, {instr.number})")
        raise Unsupported(instr.text)

    def op_fence(self, instr, mods, args):
        if mods[:2] == ["proxy", "async"] or mods[:1] == ["proxy"] and mods[1].startswith("async"):
            self.emit(f"M.fence_async(i, {self.mask()})")
        elif "tensormap::generic" in mods:
            self.emit(f"M.fence_tensormap(i, {self.mask()})")

    def op_membar(self, instr, mods, args):
        pass

    def op_prefetch(self, instr, mods, args):
        pass

    def op_setmaxnreg(self, instr, mods, args):
        pass

    def op_griddepcontrol(self, instr, mods, args):
        pass

    def op_nanosleep(self, instr, mods, args):
        pass

    def op_tensormap(self, instr, mods, args):
        mask = self.mask()
        if mods[0] == "replace":
            field_name = mods[2]
            space = "shared" if any(m.startswith("shared") for m in mods) else "global"
            address = self.address(args[0], "u4" if space == "shared" else "u8")
            if len(args) == 3:
                ordinal, value = args[1].bits, args[2]
            else:
                ordinal, value = 0, args[1]
            t = "u8" if "b64" in mods else "u4"
            return self.emit(f"M.tensormap_replace(i, {mask}, {space!r}, {address}, {field_name!r}, {ordinal}, {self.get(value, t)}, {instr.number})")
        if mods[0] == "cp_fenceproxy":
            return self.emit(f"M.tensormap_copy(i, {mask}, {self.address(args[0], 'u8')}, {self.address(args[1], 'u4')}, {instr.number})")
        raise Unsupported(instr.text)

    def op_wgmma(self, instr, mods, args):
        what = mods[0]
        names = self.program.async_regs
        if what == "fence":
            return None
        if what == "commit_group":
            return self.emit(f"M.wgmma_commit(i, {self.mask()})")
        if what == "wait_group":
            self.flush(names)
            self.emit(f"M.wgmma_wait(i, {self.mask()}, {args[0].bits}, {instr.number})")
            return self.forget(names)
        shape = next(m for m in mods if m.startswith("m64n"))
        kinds = [m for m in mods if m in TYPES or m == "tf32"]
        d = args[0].items
        if isinstance(args[1], Vec):
            a = "(" + ", ".join(self.get(x, "u4") for x in args[1].items) + ",)"
            rest = args[3:]
        else:
            a, rest = self.get(args[1], "u8"), args[3:]
        b = self.get(args[2], "u8")
        scale = self.get(rest[0], "b") if rest else "None"
        flags = [x.bits for x in rest[1:]]  # scale a, scale b, then transposes
        self.flush({r.name for r in d})
        target = self.program.sums(tuple(r.name for r in d))
        self.emit(f"M.wgmma({shape!r}, {kinds[0]!r}, {kinds[1]!r}, i, {self.mask()}, {target}, {a}, {b}, {scale}, {flags}, {instr.number})")
        return self.forget({r.name for r in d})
