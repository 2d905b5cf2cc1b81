"""Which forms of which PTX instructions do our kernels use? ``python tests/emulator_census.py --keep DIR`` writes
emulator_forms.txt; ``--ccs 86 89`` looks at these architectures anew and keeps what stands there of the others.

Every ahead-of-time case of kernels/ is compiled to PTX (no ptxas) for sm_80, 86, 89, 90 and 120, and every source of csrc/
as setup.py compiles it. A form is the opcode with its modifiers and the counts of its vector operands.
"""

import argparse
import hashlib
import itertools
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
FORMS = Path(__file__).with_name("emulator_forms.txt")
CCS = (80, 86, 89, 90, 120)
FAMILIES = sorted(path.stem for path in (ROOT / "sora_fast/testing/launches").glob("[a-z]*.py"))


def form(instr) -> str:
    """The opcode, and {n} for each operand that is a vector of n registers."""
    from sora_fast.emulator.ptx import Vec

    vectors = "".join(f" {{{len(arg.items)}}}" if isinstance(arg, Vec) else " _" for arg in instr.args)
    return f"{instr.op}{vectors}" if "{" in vectors and instr.parts[0] == "mov" else instr.op


def forms_of(ptx: str) -> set[str]:
    from sora_fast.emulator.ptx import Instr, parse

    return {form(item) for kernel in parse(ptx).values() for item in kernel.code if isinstance(item, Instr)}


def triton_ptx(families=FAMILIES, ccs=CCS):
    """(label, compute capability, PTX) of every case; each launch once per architecture."""
    from triton.backends.nvidia import compiler as nvidia

    from sora_fast.testing import aot

    seen = set()
    with mock.patch.object(nvidia.CUDABackend, "make_cubin", lambda self, src, metadata, opt, capability: b""):
        for family in families:
            for case in aot.ours(family):
                launch = (case.fn, str(case.signature), str(case.constexprs), case.aligned, str(case.options))
                for cc in sorted({80, *ccs} & set(case.ccs)):
                    # sm_86 and sm_89 run what sm_80 runs: of launches that it has too, the first of each kernel
                    as_sm80 = cc in (86, 89) and (launch, 80) in seen and (case.fn, cc) in seen
                    known = (launch, cc) in seen or as_sm80
                    seen |= {(launch, cc), (case.fn, cc)}
                    if known or cc not in ccs:
                        continue
                    kernel, _ = aot.build(case.fn, case.signature, case.constexprs, case.aligned, cc, case.options)
                    yield f"{family} {case.name} {case.fn.__name__}", cc, kernel.asm["ptx"]


def csrc_ptx(folder: Path, ccs=CCS):
    """(label, compute capability, PTX) of csrc's sources, for their architectures of setup.py that the emulator runs."""
    for source, arch in (("normalization.cu", "sm_80"), ("wgmma_selftest.cu", "sm_90a"), ("convolution.cu", "sm_90a")):
        if int(arch.strip("sm_a")) not in ccs:
            continue
        out = folder / f"{source}.ptx"
        flags = ["-std=c++17", "-O3", "-lineinfo", "-ptx", f"-arch={arch}"]
        command = ["nvcc", *flags, str(ROOT / "csrc" / source), "-o", str(out)]
        subprocess.run(command, check=True)
        yield f"csrc {source}", int(arch.strip("sm_a")), out.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, required=True, help="folder for the PTX files")
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    parser.add_argument("--ccs", nargs="*", type=int, default=CCS)
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    for label, cc, ptx in itertools.chain(triton_ptx(args.families, args.ccs), csrc_ptx(args.keep, args.ccs)):
        name = re.sub(r"\W+", "-", label.lower())
        (args.keep / f"{name}-{hashlib.sha256(ptx.encode()).hexdigest()[:8]}-sm{cc}.ptx").write_text(ptx)
    write(args.keep, set(args.ccs))


def write(folder: Path, ccs: set[int]) -> None:
    """The list, of a folder of PTX files for ``ccs``: each form, and the architectures whose kernels use it."""
    used = defaultdict(set)
    for line in FORMS.read_text().splitlines():
        each, _, known = line.partition("\t")
        used[each] = {int(cc) for cc in known.split()} - ccs
    for path in sorted(folder.glob("*-sm*.ptx")):
        for each in forms_of(path.read_text()):
            used[each].add(int(path.stem.rpartition("-sm")[2]))
    used = {each: known for each, known in used.items() if known}
    lines = [f"{each}\t{' '.join(map(str, sorted(ccs)))}\n" for each, ccs in sorted(used.items())]
    FORMS.write_text("".join(lines))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    main()
