"""Loads, stores, copies, barriers, matrix instructions and shuffles as calls to the machine (PTX ISA 9.7.9, 9.7.13 to
9.7.15)."""

from dataclasses import replace

from .blocks import TYPES, WIDTH, indices, registers
from .forms import Unsupported
from .loads_stores import ATOMIC
from .ptx import Mem, Not, Reg, Sink, Sym, Vec


def state_space(mods) -> str:
    """The state space that an instruction names; without one, addresses are generic (PTX ISA 5.1)."""
    spaces = [m.partition("::")[0] for m in mods]
    return next((space for space in spaces if space in ("global", "shared", "param", "const", "local")), "generic")


def vector(mods) -> int:
    return next((int(m[1:]) for m in mods if m in ("v2", "v4", "v8")), 1)


def ordering(mods) -> tuple[str, ...]:
    """(semantics, scope) of a strong access (PTX ISA 8.4), () of a weak one. volatile is relaxed at system scope."""
    if "volatile" in mods:
        return "relaxed", "sys"
    order = next((m for m in mods if m in ("relaxed", "acquire", "release", "acq_rel")), None)
    return (order, next((m for m in mods if m in ("cta", "gpu", "sys")), "gpu")) if order else ()


class Memory:
    """Emits calls to M, the machine. They pass ``i`` and ``k``, the warps and the active lanes (codegen.py), and the
    instruction's number, for error messages.
    """

    def op_cvta(self, instr, mods, args):
        if "param" in mods:
            return self.put(
                args[0],
                "u8",
                f"M.param_address({args[1].name!r})"
                if isinstance(args[1], Sym)
                else f"M.generic_param({self.get(args[1], 'u8')})",
                False,
            )
        space = next(m for m in mods if m in ("global", "shared", "local", "const", "param"))
        t = TYPES[self.type_of(mods)]
        value = self.get(args[1], t)
        if space in ("shared", "local"):
            self.put(
                args[0],
                t,
                f"{value} {'-' if 'to' in mods else '+'} {'SHARED_WINDOW' if space == 'shared' else 'LOCAL_WINDOW'}",
            )
        else:
            self.put(args[0], t, value, False)

    def op_ld(self, instr, mods, args):
        t, count, space = TYPES[self.type_of(mods)], vector(mods), state_space(mods)
        mem = args[1]
        if space == "param" and isinstance(mem.base, Sym):
            call = f"M.param({mem.base.name!r}, {mem.offset}, {t!r}, {count})"
        else:
            space = "const" if space == "param" else space  # ld.param through a register; read-only, as const
            address, order = self.address(mem, self.address_type(space, mem)), ordering(mods)
            call = f"M.ld({space!r}, i, {self.mask()}, {address}, {t.upper()}, {count}, {instr.number}, *{order})"
        if count == 1:
            return self.put(args[0], t, call)
        self.temp += 1
        temp = f"t{self.temp}"
        self.emit(f"{temp} = {call}")
        for at, item in enumerate(args[0].items):
            if not isinstance(item, Sink):
                self.put(item, t, f"{temp}[..., {at}]")
        return None

    op_ldu = op_ld

    def op_st(self, instr, mods, args):
        t, space = TYPES[self.type_of(mods)], state_space(mods)
        items = args[1].items if isinstance(args[1], Vec) else (args[1],)
        values = ", ".join(self.get(item, t) for item in items)
        address, order = self.address(args[0], self.address_type(space, args[0])), ordering(mods)
        self.emit(f"M.st({space!r}, i, {self.mask()}, {address}, ({values},), {t.upper()}, {instr.number}, *{order})")

    @staticmethod
    def address_type(space, mem) -> str:
        is_64bit = space not in ("shared", "local") or isinstance(mem.base, Reg) and mem.base.size == 8
        return "u8" if is_64bit else "u4"

    def op_atom(self, instr, mods, args):
        self.atomic(instr, mods, args[0], args[1], args[2:])

    def op_red(self, instr, mods, args):
        self.atomic(instr, mods, None, args[0], args[1:])

    def atomic(self, instr, mods, to, mem, values):
        kind, space = self.type_of(mods), state_space(mods)
        operation = next(m for m in mods if m in ATOMIC)
        if kind in ("bf16", "f16x2", "bf16x2"):
            operation = f"{operation}_{kind}"
            if operation not in ATOMIC:
                raise Unsupported(f"this form of the instruction is not emulated: {instr.text}")
        t = TYPES[kind]
        if "L2::cache_hint" in mods:
            values = values[:-1]
        order, kind = ordering(mods) or ("relaxed", "gpu"), self.address_type(space, mem)
        # each element of a vector is a separate atomic operation (PTX ISA 9.7.13.5)
        for at in range(vector(mods)):
            each = lambda arg, at=at: arg.items[at] if isinstance(arg, Vec) else arg
            operands = ", ".join(self.get(each(v), t) for v in values)
            address = self.address(replace(mem, offset=mem.offset + at * WIDTH[t]), kind)
            what = f"{space!r}, {operation!r}, i, {self.mask()}"
            call = f"M.atomic({what}, {address}, ({operands},), {t.upper()}, {instr.number}, *{order})"
            if to is None or isinstance(each(to), Sink):
                self.emit(call)
            else:
                self.put(each(to), t, call)

    def op_ldmatrix(self, instr, mods, args):
        count = next(int(m[1:]) for m in mods if m in ("x1", "x2", "x4"))
        self.temp += 1
        address = self.address(args[1], "u4")
        self.emit(f"t{self.temp} = M.ldmatrix(i, {self.mask()}, {address}, {count}, {'trans' in mods}, {instr.number})")
        items = args[0].items if isinstance(args[0], Vec) else (args[0],)
        for at, item in enumerate(items):
            self.put(item, "u4", f"t{self.temp}[{at}]")

    def op_stmatrix(self, instr, mods, args):
        count = next(int(m[1:]) for m in mods if m in ("x1", "x2", "x4"))
        items = args[1].items if isinstance(args[1], Vec) else (args[1],)
        values = ", ".join(self.get(item, "u4") for item in items)
        address = self.address(args[0], "u4")
        self.emit(f"M.stmatrix(i, {self.mask()}, {address}, ({values},), {count}, {'trans' in mods}, {instr.number})")

    def op_mma(self, instr, mods, args):
        shape = next(m for m in mods if m.startswith("m") and "n" in m[1:] and "k" in m)
        kinds = [m for m in mods if m in TYPES or m == "tf32"]  # d, a, b, c
        depth = int(shape.partition("k")[2])
        a = self.fragment("a", args[1].items, depth, kinds[1])
        b = self.fragment("b", args[2].items if isinstance(args[2], Vec) else (args[2],), depth, kinds[1])
        if kinds[0] != "f32":
            raise Unsupported(instr.text)
        c = ", ".join(self.get(x, "f4") for x in args[3].items)
        self.temp += 1
        self.emit(f"t{self.temp} = M.mma({a}, {b}, ({c},), {self.mask()}, {instr.number})")
        for at, item in enumerate(args[0].items):
            self.put(item, "f4", f"t{self.temp}[{at}]")

    def fragment(self, operand, items, depth, kind) -> str:
        """An mma operand as a matrix, built once for all mma of the basic block that read the same registers."""
        key = (operand, kind, depth, *((x, self.versions[x.name] if isinstance(x, Reg) else 0) for x in items))
        if key not in self.fragments:
            self.temp += 1
            registers = ", ".join(self.get(x, "u4") for x in items)
            self.emit(f"t{self.temp} = M.fragment({operand!r}, ({registers},), {depth}, {kind!r})")
            self.fragments[key] = f"t{self.temp}"
        return self.fragments[key]

    def check_membermask(self, arg) -> None:
        if self.masked:
            self.emit(f"M.check_converged(i, k, {self.get(arg, 'u4')}, {self.instr.number})")

    def op_shfl(self, instr, mods, args):
        self.check_membermask(args[4])
        to, p = args[0].items if isinstance(args[0], Vec) else (args[0], None)
        value = self.get(args[1], "u4")
        self.temp += 1
        self.emit(f"t{self.temp} = M.shuffle({mods[1]!r}, i, {value}, {self.get(args[2], 'u4')}, {self.get(args[3], 'u4')})")
        if not isinstance(to, Sink):
            self.put(to, "u4", f"t{self.temp}[0]")
        if p is not None and not isinstance(p, Sink):
            self.put(p, "b", f"t{self.temp}[1]")

    def op_vote(self, instr, mods, args):
        self.check_membermask(args[2])
        t = "u4" if "ballot" in mods else "b"
        self.put(args[0], t, f"M.vote({mods[1]!r}, i, {self.mask()}, {self.get(args[1], 'b')}, {self.get(args[2], 'u4')})")

    def op_redux(self, instr, mods, args):
        self.check_membermask(args[2])
        t = TYPES[self.type_of(mods)]
        operation = next(m for m in mods if m in ("add", "min", "max", "and", "or", "xor"))
        self.put(args[0], t, f"M.redux({operation!r}, i, {self.mask()}, {self.get(args[1], t)}, {self.get(args[2], 'u4')})")

    def op_elect(self, instr, mods, args):
        self.check_membermask(args[1])
        to, p = args[0].items
        self.temp += 1
        self.emit(f"t{self.temp} = M.elect(i, {self.mask()}, {self.get(args[1], 'u4')})")
        self.put(to, "u4", f"np.broadcast_to(t{self.temp}.argmax(1)[:, None].astype(U4), t{self.temp}.shape)")
        self.put(p, "b", f"t{self.temp}")

    def op_activemask(self, instr, mods, args):
        self.put(args[0], "u4", f"M.activemask(i, {self.mask()})")

    def op_bar(self, instr, mods, args):  # bar.warp.sync
        self.check_membermask(args[0])
        self.emit(f"M.warp_barrier(i, {self.mask()})")

    def op_cp(self, instr, mods, args):
        rest = ".".join(mods)
        mask = self.mask()
        if rest.startswith("async.bulk"):
            if "commit_group" in rest:
                return self.emit(f"M.bulk_commit(i, {mask})")
            if "wait_group" in rest:
                return self.emit(f"M.bulk_wait(i, {mask}, {args[0].bits}, {'read' in mods})")
            to, source = args[:2]
            if "complete_tx::bytes" in rest:
                coords = ", ".join(self.get(c, "i4") for c in source.coords)
                return self.emit(
                    f"M.tma_load(i, {mask}, {self.address(to, 'u4')}, {self.address(source, 'u8')}, "
                    f"({coords},), {self.address(args[2], 'u4')}, {instr.number})"
                )
            coords = ", ".join(self.get(c, "i4") for c in to.coords)
            tensor_map, shared = self.address(to, "u8"), self.address(source, "u4")
            return self.emit(f"M.tma_store(i, {mask}, {tensor_map}, ({coords},), {shared}, {instr.number})")
        if rest.startswith("async.mbarrier"):
            return self.emit(f"M.async_arrive(i, {mask}, {self.address(args[0], 'u4')}, {'noinc' in mods}, {instr.number})")
        if "commit_group" in mods:
            return self.emit(f"M.async_commit(i, {mask})")
        if "wait_group" in mods:
            return self.emit(f"M.async_wait(i, {mask}, {args[0].bits})")
        if "wait_all" in mods:
            return self.emit(f"M.async_wait(i, {mask}, None)")
        # cp.async.ca.shared.global [to], [source], size{, src-size}{, cache-policy}
        rest = args[3:-1] if "L2::cache_hint" in mods else args[3:]
        if rest and isinstance(rest[0], (Not, Reg)) and (isinstance(rest[0], Not) or rest[0].pred):
            raise Unsupported(f"cp.async with an ignore-src predicate is not emulated: {instr.text}")
        src_size = self.get(rest[0], "u4") if rest else self.program.constant(args[2].bits, "int", "u4")
        return self.emit(
            f"M.async_copy(i, {mask}, {self.address(args[0], 'u4')}, {self.address(args[1], 'u8')}, "
            f"{args[2].bits}, {src_size}, {instr.number})"
        )

    def op_mbarrier(self, instr, mods, args):
        mask = self.mask()
        what = mods[0]
        if what == "init":
            return self.emit(
                f"M.mbarrier_init(i, {mask}, {self.address(args[0], 'u4')}, {self.get(args[1], 'u4')}, {instr.number})"
            )
        if what == "inval":
            return self.emit(f"M.mbarrier_inval(i, {mask}, {self.address(args[0], 'u4')}, {instr.number})")
        if what in ("arrive", "expect_tx"):
            rest = args if isinstance(args[0], Mem) else args[1:]
            if not isinstance(args[0], (Mem, Sink)):
                raise Unsupported(f"{instr.text}: the state is not kept")
            expect = "expect_tx" in mods
            value = self.get(rest[1], "u4") if len(rest) > 1 else "None"
            return self.emit(
                f"M.mbarrier_arrive(i, {mask}, {self.address(rest[0], 'u4')}, {'None' if expect else value}, "
                f"{value if expect else 'None'}, {what == 'arrive'}, {instr.number})"
            )
        raise Unsupported(instr.text)

    def op_fence(self, instr, mods, args):
        if mods[0] == "proxy" and mods[1] == "async":
            if mods[2:] != ["global"]:
                self.emit(f"M.proxy_fence(i, {self.mask()})")
        elif mods[0] == "mbarrier_init":
            self.emit(f"M.mbarrier_init_fence(i, {self.mask()})")
        elif mods[1] == "tensormap::generic" and mods[2] == "acquire":
            self.emit(f"M.tensormap_fence(i, {self.mask()}, {self.address(args[0], 'u8')})")
        elif mods[0] != "proxy" and mods[-1] != "cta":
            self.emit(f"M.memory_fence(i, {self.mask()})")

    def op_membar(self, instr, mods, args):
        if mods[0] != "cta":
            self.emit(f"M.memory_fence(i, {self.mask()})")

    def op_createpolicy(self, instr, mods, args):
        self.put(args[0], "u8", self.program.constant(0, "int", "u8"))

    def without_effect(self, instr, mods, args):
        """Hints, and instructions that affect only timing or register allocation."""

    op_prefetch = op_prefetchu = op_discard = op_applypriority = without_effect
    op_setmaxnreg = op_griddepcontrol = op_nanosleep = without_effect

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
            value = self.get(value, "u8" if "b64" in mods else "u4")
            return self.emit(
                f"M.tensormap_replace(i, {mask}, {space!r}, {address}, {field_name!r}, {ordinal}, {value}, {instr.number})"
            )
        if mods[0] == "cp_fenceproxy":
            to, source = self.address(args[0], "u8"), self.address(args[1], "u4")
            return self.emit(f"M.tensormap_copy(i, {mask}, {to}, {source}, {instr.number})")
        raise Unsupported(instr.text)

    def op_wgmma(self, instr, mods, args):
        what = mods[0]
        names = self.program.accumulator_regs
        if what == "fence":
            return self.emit(f"M.wgmma_fence(i, {self.mask()})")
        if what == "commit_group":
            return self.emit(f"M.wgmma_commit(i, {self.mask()})")
        if what == "wait_group":
            self.flush(names)
            self.emit(f"M.wgmma_wait(i, {self.mask()}, {args[0].bits})")
            return self.invalidate(names)
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
        flags = [x.bits for x in rest[1:]]  # imm-scale-a, imm-scale-b, then imm-trans-a, imm-trans-b
        self.flush({r.name for r in d})
        target = self.program.accumulators(tuple(r.name for r in d))
        used = [self.program.wgmma_registers[r.name] for x in args[:2] for r in registers(x) if isinstance(x, Vec)]
        self.emit(
            f"M.wgmma({shape!r}, {kinds[1]!r}, i, {self.mask()}, {target}, {indices(used)}, {a}, {b}, {scale}, {flags}, "
            f"{instr.number})"
        )
        return self.invalidate({r.name for r in d})
