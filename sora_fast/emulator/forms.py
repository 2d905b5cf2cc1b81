"""The forms of PTX instructions that the emulator supports. Any other is rejected by name before anything runs.

Modifiers change semantics (add.sat, cvt.satfinite, ld.shared::cluster), so a form is accepted only as a whole. Modifiers are
in the order of the ISA, and for atom, red and ld also in the older one that Triton emits (atom.global.gpu.acq_rel.add.f32).
"""

import re
from functools import cache

from .ptx import Imm, Instr, Kernel, Mem, Not, Reg, Sink, Special, Sym, Vec


class Unsupported(Exception):
    """An instruction, or a form of one, that the emulator does not execute."""


INT = r"[su](16|32|64)"
HALF = r"(f16|f16x2|bf16|bf16x2)"
PAIR = r"(rn\.)?(ftz\.)?f32x2"
FLOAT = r"((ftz\.)?f32|f64)"
ANY = r"([busf](8|16|32|64)|bf16)"
SCOPE = r"(cta|gpu|sys)"
SHARED = r"shared(::cta)?"
ATOMIC = r"(add|min|max|and|or|xor|exch|cas|inc|dec)"
HINTS = r"(\.L1::(evict_\w+|no_allocate))?(\.L2::evict_\w+)?(\.L2::cache_hint)?(\.L2::\d+B)?"
STRONG = rf"(volatile|(relaxed|acquire|release)\.{SCOPE})"
VECTOR = r"(\.v[248])?"

FORMS = {
    # integer and floating-point arithmetic (PTX ISA 9.7.1, 9.7.3, 9.7.4)
    "add": rf"{INT}|[su]16x2|(rn\.)?{FLOAT}|(rn\.)?{HALF}|{PAIR}|(rn\.)?f32\.b?f16",
    "sub": rf"{INT}|(rn\.)?{FLOAT}|(rn\.)?{HALF}|{PAIR}|(rn\.)?f32\.b?f16",
    "mul": rf"(lo|hi)\.{INT}|wide\.[su](16|32)|(rn\.)?{FLOAT}|(rn\.)?{HALF}|{PAIR}",
    "mad": rf"lo\.cc\.u32|lo\.{INT}|hi\.{INT}|wide\.[su](16|32)|rn\.{FLOAT}",
    "madc": r"hi\.u32",
    "fma": rf"rn\.(ftz\.)?f32x2|rn\.f32\.b?f16|rn\.{FLOAT}|rn\.(relu\.)?{HALF}",
    "div": rf"{INT}|(approx|full|rn)\.(ftz\.)?f32|rn\.f64",
    "rem": INT,
    "min": rf"{INT}|(ftz\.)?(NaN\.)?(xorsign\.abs\.)?f32|f64|(NaN\.)?{HALF}",
    "max": rf"{INT}|(ftz\.)?(NaN\.)?(xorsign\.abs\.)?f32|f64|(NaN\.)?{HALF}",
    "neg": rf"s(16|32|64)|{FLOAT}|{HALF}",
    "abs": rf"s(16|32|64)|{FLOAT}|{HALF}",
    "ex2": rf"approx\.(ftz\.)?f32|approx\.(ftz\.)?{HALF}",
    "lg2": r"approx\.(ftz\.)?f32",
    "rcp": r"(approx|rn)\.(ftz\.)?f32|rn\.f64",
    "sqrt": r"(approx|rn)\.(ftz\.)?f32|rn\.f64",
    "rsqrt": r"approx\.(ftz\.)?(f32|f64)",
    "sin": r"approx\.(ftz\.)?f32",
    "cos": r"approx\.(ftz\.)?f32",
    "tanh": rf"approx\.(f32|{HALF})",
    "popc": r"b(32|64)",
    "clz": r"b(32|64)",
    "brev": r"b32",
    "bfe": r"[su](32|64)",
    "bfi": r"b(32|64)",
    # comparison, logic, shifts (9.7.6 to 9.7.8)
    "setp": rf"(eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan)(\.(and|or|xor))?\.(ftz\.)?{ANY}",
    "selp": r"[bsu](16|32|64)|f(32|64)",
    "and": r"pred|b(16|32|64)",
    "or": r"pred|b(16|32|64)",
    "xor": r"pred|b(16|32|64)",
    "not": r"pred|b(16|32|64)",
    "lop3": r"b32",
    "shl": r"b(16|32|64)",
    "shr": INT + r"|b(16|32|64)",
    "shf": r"[lr]\.(clamp|wrap)\.b32",
    "prmt": r"b32",
    # moves, conversions, memory (9.7.9)
    "mov": r"pred|[bsu](16|32|64)|f(32|64)",
    "cvt": r"[su](8|16|32|64)\.[su](8|16|32|64)|r[nzmp]i\.(ftz\.)?[su](8|16|32|64)\.(f16|bf16|f32|f64)|"
    r"rn\.(f16|bf16|f32|f64)\.[su](8|16|32|64)|(r[nzmp]i\.)?(ftz\.)?(sat\.)?f32\.f32|f64\.f32|rn\.(ftz\.)?f32\.f64|"
    r"r[nz]\.b?f16(x2)?\.f32|(ftz\.)?f32\.b?f16|r(na|n|z)\.tf32\.f32",
    "cvta": r"(to\.)?(global|shared|const|param)\.u64",
    "shfl": r"sync\.(up|down|bfly|idx)\.b32",
    "ld": rf"((weak|{STRONG})\.)?((global|{SHARED}|const|param|local)(\.(ca|cg|cs|lu|cv))?"
    rf"(\.{SCOPE}\.(relaxed|acquire))?(\.nc)?{HINTS}\.)?(v[248]\.)?{ANY}",
    "ldu": rf"global{VECTOR}\.{ANY}",
    "st": rf"((weak|{STRONG})\.)?((global|{SHARED}|local)(\.(wb|cg|cs|wt))?{HINTS}\.)?(v[248]\.)?{ANY}",
    "prefetch": r"tensormap|(global\.)?L[12].*",
    "prefetchu": r"L1",
    "createpolicy": r".*",
    "discard": r".*",
    "applypriority": r".*",
    "cp": rf"async\.(ca|cg)\.{SHARED}\.global(\.L2::(cache_hint|64B|128B|256B))*|async\.(commit_group|wait_group|wait_all)|"
    rf"async\.mbarrier\.arrive(\.noinc)?\.{SHARED}\.b64|async\.bulk\.commit_group|async\.bulk\.wait_group(\.read)?|"
    r"async\.bulk\.tensor\.[1-5]d\.shared::(cta|cluster)\.global(\.tile)?\.mbarrier::complete_tx::bytes(\.L2::cache_hint)?|"
    r"async\.bulk\.tensor\.[1-5]d\.global\.shared::cta(\.tile)?\.bulk_group(\.L2::cache_hint)?",
    "tensormap": r"replace\.tile\.\w+\.(global|shared::cta)\.b1024\.b(32|64)|"
    r"cp_fenceproxy\.global\.shared::cta\.tensormap::generic\.release\.(cta|gpu|sys)\.sync\.aligned",
    # control flow (9.7.12)
    "bra": r"|uni",
    "ret": r"|uni",
    "exit": r"",
    "trap": r"",
    # synchronisation (9.7.13)
    "bar": r"(cta\.)?(sync|arrive)|warp\.sync",
    "barrier": r"(cta\.)?(sync|arrive)(\.aligned)?",
    "membar": r"cta|gl|sys",
    "fence": rf"(sc|acq_rel|acquire|release)\.(cluster|{SCOPE})|proxy\.async(\.(global|shared::cta|shared::cluster))?|"
    rf"mbarrier_init\.release\.cluster|proxy\.tensormap::generic\.(acquire|release)\.{SCOPE}",
    "mbarrier": rf"(init|inval)\.{SHARED}\.b64|arrive(\.release\.cta)?(\.expect_tx)?\.{SHARED}\.b64|"
    rf"expect_tx(\.relaxed\.cta)?\.{SHARED}\.b64|(try_wait|test_wait)\.parity(\.acquire\.cta)?\.{SHARED}\.b64",
    "atom": rf"((relaxed|acquire|release|acq_rel)\.)?({SCOPE}\.)?((global|{SHARED})\.)?({SCOPE}\.)?"
    rf"((relaxed|acquire|release|acq_rel)\.)?({SCOPE}\.)?{ATOMIC}(\.noftz)?(\.L2::cache_hint)?(\.v[248])?\.([busf](32|64)|{HALF})",
    "vote": r"sync\.(ballot\.b32|(any|all|uni)\.pred)",
    "redux": r"sync\.((add|min|max)\.[su]32|(and|or|xor)\.b32)",
    "elect": r"sync",
    "activemask": r"b32",
    "griddepcontrol": r"wait|launch_dependents",
    "nanosleep": r"u32",
    "setmaxnreg": r"(inc|dec)\.sync\.aligned\.u32",
    # matrices (9.7.14, 9.7.15)
    "ldmatrix": rf"sync\.aligned\.m8n8\.x[124](\.trans)?\.{SHARED}\.b16",
    "stmatrix": rf"sync\.aligned\.m8n8\.x[124](\.trans)?\.{SHARED}\.b16",
    "mma": r"sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(bf16\.bf16|f16\.f16)\.f32|"
    r"sync\.aligned\.m16n8k[48]\.row\.col\.f32\.tf32\.tf32\.f32",
    "wgmma": r"(fence|commit_group|wait_group)\.sync\.aligned|"
    r"mma_async\.sync\.aligned\.m64n\d+(k16\.f32\.(bf16\.bf16|f16\.f16)|k8\.f32\.tf32\.tf32)",
}
FORMS["red"] = FORMS["atom"]
PATTERNS = {root: re.compile(rf"(?:{pattern})\Z") for root, pattern in FORMS.items()}

# Rejected with a message of their own, for features that users would search for.
UNSUPPORTED_FEATURES = {
    r"tcgen05\..*": "tensor memory and tcgen05 of sm_100",
    r"(mapa|getctarank)\..*|barrier\.cluster.*|.*multicast::cluster.*": "clusters of CTAs",
    r"(ld|st|atom|red|mbarrier)\..*cluster.*": "clusters of CTAs",
    r"cvta\..*local.*": "generic addresses of local memory",
    r"call.*": "tl.device_print and other calls of functions",
    r"mma\..*|wgmma\.mma_async.*": "this shape or these types of a matrix multiply",
}
SPECIAL_REGISTERS = re.compile(  # those that are emulated
    r"(tid|ntid|ctaid|nctaid)\.[xyz]|laneid|warpid|nwarpid|lanemask_(lt|le|eq|ge|gt)|cluster_n?ctarank|dynamic_smem_size"
)


@cache
def reason(op: str) -> str:
    """Why the opcode with these modifiers is not supported; "" if it is."""
    root, _, rest = op.partition(".")
    for pattern, what in UNSUPPORTED_FEATURES.items():
        if re.fullmatch(pattern, op) and not (root in PATTERNS and PATTERNS[root].match(rest)):
            return f"{what} are not emulated" if what.endswith("s") else f"{what} is not emulated"
    if root not in PATTERNS:
        return "this instruction is not emulated"
    return "" if PATTERNS[root].match(rest) else "this form of the instruction is not emulated"


def check(kernel: Kernel) -> None:
    """Reject a kernel with an unsupported instruction, special register or symbol."""

    def refuse(instr: Instr, why: str):
        raise Unsupported(f"{kernel.name} at {instr.loc or 'no line'}: {why}: `{instr.text}`")

    if "explicitcluster" in kernel.attributes or any(n != 1 for n in kernel.attributes.get("reqnctapercluster", ())):
        raise Unsupported(f"{kernel.name}: clusters of CTAs are not emulated: .reqnctapercluster")
    known = {p.name for p in kernel.params} | set(kernel.variables) | {"WARP_SZ"}
    instrs = [item for item in kernel.code if isinstance(item, Instr)]
    for instr in sorted(instrs, key=lambda instr: instr.parts[0] != "call"):  # not an instruction that prepares a call
        if why := reason(instr.op):
            refuse(instr, why)
        if instr.guard and blocking(instr):
            refuse(instr, "a predicate on a barrier or on a wait for an mbarrier is not emulated")
        for leaf in leaf_operands(instr.args):
            if isinstance(leaf, Special) and not SPECIAL_REGISTERS.fullmatch(leaf.name):
                refuse(instr, f"the special register %{leaf.name} is not emulated")
            if isinstance(leaf, Sym) and leaf.name not in known and instr.parts[0] != "bra":
                refuse(instr, f"{leaf.name} is not declared")


def blocking(instr: Instr) -> bool:
    """May a warp have to wait here?"""
    root = instr.parts[0]
    if root in ("bar", "barrier"):
        return instr.parts[1] != "warp"
    return root == "mbarrier" and instr.parts[1] in ("try_wait", "test_wait")


def leaf_operands(args):
    """Operands without the vectors and addresses around them."""
    for arg in args:
        if isinstance(arg, Vec):
            yield from leaf_operands(arg.items)
        elif isinstance(arg, Mem):
            yield from leaf_operands((arg.base, *arg.coords))
        elif isinstance(arg, Not):
            yield arg.reg
        elif isinstance(arg, (Reg, Imm, Special, Sym, Sink)):
            yield arg
