"""Arithmetic, comparisons, logic, moves and conversions as numpy expressions (PTX ISA 9.7.1 to 9.7.9)."""

from .blocks import TYPES, WIDTH
from .forms import Unsupported
from .ptx import Imm, Reg, Sink, Special, Vec

COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
FLIPPED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}  # unordered: not the opposite


class Arithmetic:
    """Emits one expression per instruction; its helpers are in arith.py."""

    def binary(self, instr, mods, args, operator: str) -> None:
        if "f32x2" in mods:
            function = {"+": "np.add", "-": "np.subtract", "*": "np.multiply"}[operator]
            a, b = self.get(args[1], "u8"), self.get(args[2], "u8")
            return self.put(args[0], "u8", f"f32x2({function}, {self.ftz}, {a}, {b})")
        kind = self.type_of(mods)
        if kind in ("f16", "bf16") and "f32" in mods:  # mixed precision (PTX ISA 9.7.5): the first operand has 16 bits
            first = f"half_to_float({self.get(args[1], 'u2')}, {kind!r})"
            return self.put(args[0], "f4", f"{first} {operator} {self.get(args[2], 'f4')}")
        if kind in ("f16x2", "bf16x2", "bf16", "f16"):
            helper = {"+": "add", "-": "sub", "*": "mul"}[operator]
            t = TYPES[kind] if kind != "f16" else "u2"
            return self.put(args[0], t, f"packed_{helper}({self.get(args[1], t)}, {self.get(args[2], t)}, {kind!r})")
        t = TYPES[kind]
        if kind in ("s16x2", "u16x2"):
            return self.put(
                args[0], t, f"packed_int_add({self.get(args[1], t)}, {self.get(args[2], t)})"
            )  # add alone has it
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
        if "f32x2" in mods:
            return self.binary(instr, mods, args, "*")
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
            return self.put(
                args[0], wide, f"{a}.astype({wide.upper()}) * {b}.astype({wide.upper()}) + {self.get(args[3], wide)}"
            )
        if "hi" in mods:
            return self.put(args[0], t, f"mul_hi({a}, {b}) + {self.get(args[3], t)}")
        if "cc" in mods:  # the carry-out (PTX ISA 9.7.2), which a madc in this block adds
            self.carry = True
            self.emit(f"carry = (({a} * {b}).astype(U8) + {self.get(args[3], t)}.astype(U8) >> U8(32)).astype(U4)")
        if t[0] == "f":
            return self.op_fma(instr, mods, args)
        self.put(args[0], t, f"{a} * {b} + {self.get(args[3], t)}")

    def op_madc(self, instr, mods, args):
        if not self.carry:
            raise Unsupported(f"a carry of another basic block is not emulated: {instr.text}")
        a, b, c = (self.get(arg, "u4") for arg in args[1:4])
        self.put(args[0], "u4", f"mul_hi({a}, {b}) + {c} + carry")

    def op_fma(self, instr, mods, args):
        if "f32x2" in mods:
            a, b, c = (self.get(arg, "u8") for arg in args[1:4])
            return self.put(args[0], "u8", f"f32x2(fma32, {self.ftz}, {a}, {b}, {c})")
        kind = self.type_of(mods)
        if kind in ("f16", "bf16") and "f32" in mods:  # mixed precision: the multiplicands have 16 bits
            a, b = (f"half_to_float({self.get(arg, 'u2')}, {kind!r})" for arg in args[1:3])
            return self.put(args[0], "f4", f"fma32({a}, {b}, {self.get(args[3], 'f4')})")
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
            return self.put(
                args[0], t, f"packed_{name}({self.get(args[1], t)}, {self.get(args[2], t)}, {kind!r}, {'NaN' in mods})"
            )
        t = TYPES[kind]
        function = f"np.{name}imum" if t[0] != "f" or "NaN" in mods else f"np.f{name}"
        if "xorsign" in mods:
            a, b = (self.get(arg, t) for arg in args[1:3])
            sign = f"np.where(np.signbit({a}) ^ np.signbit({b}), F4(-1), F4(1))"
            return self.put(args[0], t, f"np.copysign({function}(np.abs({a}), np.abs({b})), {sign})")
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
        self.put(args[0], "u4", f"funnel_shift({a}, {b}, {c}, {mods[0] == 'l'}, {'wrap' in mods})")

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
        self.put(args[0], "u4", f"byte_permute({a}, {b}, {c})")

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
            joined = " | ".join(
                [parts[0], *(f"({p} << {self.program.constant(bits * at, 'int', t)})" for at, p in enumerate(parts) if at)]
            )
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
        if isinstance(source, Reg) and not source.pred and source.name in self.typed_views:
            t = next(iter(self.typed_views[source.name]))
        fresh = (
            not isinstance(source, (Reg, Special))
            or isinstance(source, Reg)
            and source.name in self.typed_views
            and source.name not in self.loaded
        )
        if isinstance(source, Reg):
            value = self.get(source, t)
            fresh = fresh and source.name not in self.loaded
        else:
            value = self.get(source, t)
        self.put(to, t, value, fresh)

    def op_setp(self, instr, mods, args):
        kind = self.type_of(mods)
        t = TYPES[kind]
        if kind in ("f16", "bf16"):
            a, b = (f"half_to_float({self.get(x, 'u2')}, {kind!r})" for x in args[1:3])
        else:
            a, b = self.get(args[1], t), self.get(args[2], t)
        name = mods[0]
        if name in FLIPPED:
            found = (
                f"~({a} {FLIPPED[name]} {b})"
                if name not in ("equ", "neu")
                else (f"~({a} < {b}) & ~({a} > {b})" if name == "equ" else f"~({a} == {b})")
            )
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
