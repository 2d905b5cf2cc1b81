"""Writes sora_fast/cyclemodel/calibration.json: the cycle model beside published times of kernels that nobody here wrote.

    python tests/cyclemodel_calibration.py [--keep] [--only TEXT]

Downloads wheels with pip into calibration/ (which git ignores), reads machine code out of them, and deletes them at the end.
Triton's tutorial is compiled here. What is kept: the wheel's name, version and hash, and figures. A constant of the model
changes only with the rows that it was fitted to (``fitted``).
"""

import argparse
import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sora_fast.cyclemodel import GPUS, Kernel, predict
from sora_fast.cyclemodel.calibration import FILE
from sora_fast.cyclemodel.cubins import tool

FOLDER = Path(__file__).resolve().parents[1] / "calibration"
XFORMERS, VLLM = "xformers==0.0.31.post1", "vllm-flash-attn==2.6.2"
FA3 = ("FlashAttention-3 in arXiv 2407.08608, H100 80GB SXM5, 16k tokens; read again as a transcript of its chart; the "
       "wheel's kernels are a year younger")
FA2 = "FlashAttention-2 in arXiv 2407.08608, H100 80GB SXM5, 16k tokens; read again as a transcript of its chart"
TRITON = "Triton in arXiv 2407.08608, H100 80GB SXM5, 16k tokens; read again as a transcript of its chart"
ISSUE307 = ("github.com/Dao-AILab/flash-attention/issues/307, 4 x 32 heads of 16,384 tokens, from its milliseconds; the "
            "GPU, an A100 by its rates, is not named in what could be read again")
PR205 = ("github.com/facebookexperimental/triton/pull/205, 4 x 32 heads of 16,384 tokens; the GPU, an H100 by its rates, is "
         "not named there")


@dataclass(frozen=True)
class Row:
    kernel: str
    gpu: str
    kind: str
    published: float  # TFLOP/s
    source: str
    wheel: str  # "": compiled here
    pattern: str  # of the kernel's name in it; of the tutorial: "D BLOCK_M BLOCK_N warps stages"
    warps: int  # that compute
    resident: int = 1  # blocks of an SM
    bulk: float = 0.0  # bytes that another warp loads for a block in one turn
    fitted: bool = False
    causal: bool = False


def _fa3(d: int, tile: tuple[int, int], causal: bool) -> str:
    size = rf"NS6_IJNS7_ILi{tile[0]}EEE(NS7_ILi{tile[1]}EEE|S\w_)(NS7_ILi{d}EEEEEE|S\w_EEE)"
    flags = f"Sm90ELb{causal:d}ELb0ELb0ELb0ELb0ELb0ELb0ELb[01]ELb1ELb0ELb0ELb0EEE"
    return rf"sm_90 .*MainloopFwdSm90.*?{size}Li{d}ENS_10bfloat16_tEfNS_4arch4{flags}"


def _fa3_backward(d: int, tile: tuple[int, int]) -> str:
    size = rf"NS6_IJNS7_ILi{tile[0]}EEE(NS7_ILi{tile[1]}EEE|S\w_)(NS7_ILi{d}EEEEEE|S\w_EEE)"
    flags = "Sm90ELb0ELb0ELb0ELb0ELb0.*21CollectiveEpilogueBwdI"
    return rf"sm_90 .*MainloopBwdSm90.*?{size}NS_6half_tEfNS_4arch4{flags}"


def _fa2(d: int, tile: tuple[int, int], causal: bool, cc: int) -> str:
    traits = rf"Flash_fwd_kernel_traitsILi{d}ELi{tile[0]}ELi{tile[1]}ELi4ELb0ELb0EN7cutlass6half_t"
    return rf"sm_{cc} .*{traits}.*EELb0ELb{causal:d}ELb0ELb0ELb{not causal:d}ELb1ELb0ELb0EE"


def rows() -> list[Row]:
    found = []
    for d, tile, warps, causal, published, fitted in (
        (64, (192, 192), 12, False, 497, False), (64, (192, 128), 12, True, 473, False),
        (128, (128, 176), 8, False, 648, True), (128, (128, 128), 8, True, 616, False),
        (256, (128, 80), 8, False, 756, True), (256, (128, 80), 8, True, 642, False),
    ):
        found.append(Row(f"FlashAttention-3 forward d{d}{' causal' * causal}", "h100", "forward", published, FA3, XFORMERS,
                         _fa3(d, tile, causal), warps, bulk=4 * tile[1] * d, fitted=fitted, causal=causal))
    for d, tile, published in ((64, (128, 128), 474), (128, (80, 128), 561)):
        found.append(Row(f"FlashAttention-3 backward d{d}", "h100", "backward", published, FA3, XFORMERS,
                         _fa3_backward(d, tile), 8, bulk=4 * tile[0] * d, fitted=True))
    for d, tile, causal, published in (
        (64, (128, 128), False, 324), (64, (128, 128), True, 299), (128, (128, 64), False, 370), (128, (128, 64), True, 335),
        (256, (64, 64), True, 298),
    ):
        found.append(Row(f"FlashAttention-2 forward d{d}{' causal' * causal}", "h100", "forward", published, FA2, VLLM,
                         _fa2(d, tile, causal, 90), 4, resident=2, causal=causal))
    for d, tile, published in ((64, (128, 128), 182), (128, (128, 64), 210)):
        found.append(Row(f"FlashAttention-2 forward d{d} causal", "a100", "forward", published, ISSUE307, VLLM,
                         _fa2(d, tile, True, 80), 4, resident=2, causal=True))
    found += [
        Row("Triton tutorial 06 forward d128", "h100", "forward", 487, PR205, "", "128 128 128 8 3", 8, fitted=True),
        Row("Triton tutorial 06 forward d64", "h100", "forward", 403, TRITON, "", "64 128 64 4 3", 4),
        Row("Triton tutorial 06 forward d64 causal", "a100", "forward", 187, ISSUE307, "", "64 128 64 4 3", 4, causal=True),
        Row("Triton tutorial 06 forward d128 causal", "a100", "forward", 188, ISSUE307, "", "128 128 32 4 3", 4,
            causal=True),
    ]
    return found


# ---------------------------------------------------------------------------------------------------------- wheels
def download(wheel: str) -> tuple[Path, str]:
    """The wheel's shared objects in a folder of their own, and its sha256."""
    folder = FOLDER / wheel.partition("=")[0]
    if not list(folder.glob("*.whl")):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder,
                        wheel], check=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".so") and "flash" in name and not (folder / name).exists():
                archive.extract(name, folder)
    return folder, hashlib.sha256(path.read_bytes()).hexdigest()


def extract(library: Path) -> None:
    """The cubins of a shared object beside it: cuobjdump's, or, where it gives up on the file, its fat binary's entries."""
    folder = library.parent / "cubins"
    if folder.exists():
        return
    folder.mkdir()
    if not subprocess.run([tool(), "-xelf", "all", library], cwd=folder, capture_output=True).returncode:
        return
    data, at, number = library.read_bytes(), -1, 0
    while (at := data.find(b"\x50\xed\x55\xba", at + 1)) >= 0:
        version, header, size = struct.unpack("<HHQ", data[at + 4:at + 16])
        entry, end = at + header, at + header + size
        while (version, header) == (1, 16) and entry < end:
            kind, _, skip, length = struct.unpack("<HHIQ", data[entry:entry + 16])
            if kind == 2:  # machine code
                (arch,) = struct.unpack("<I", data[entry + 28:entry + 32])
                (folder / f"{number}.sm_{arch}.cubin").write_bytes(data[entry + skip:entry + skip + length])
                number += 1
            entry += skip + length


def listing(folder: Path, pattern: str) -> tuple[str, str, int]:
    """The name of the first kernel that matches, its listing, and its registers."""
    for cubin in sorted(folder.rglob("cubins/*.cubin")):
        arch = re.search(r"sm_\d+", cubin.name)[0]
        for found in sorted(set(re.findall(rb"\.text\.(_Z[A-Za-z0-9_]{30,})", cubin.read_bytes()))):
            name = found.decode()
            if re.search(pattern, f"{arch} {name}"):
                shown = subprocess.run([tool(), "-sass", "-fun", name, cubin], capture_output=True, text=True).stdout
                text = shown if "/*0000*/" in shown else _disassembled(cubin, name)
                usage = subprocess.run([tool(), "-res-usage", cubin], capture_output=True, text=True).stdout
                registers = re.search(rf"Function {name}:\s*\n.*?REG:(\d+)", usage)
                return name, text, int(registers[1]) if registers else 255
    raise ValueError(f"calibration: expected a kernel that matches {pattern} in {folder}, got none; look at the wheel's "
                     f"names")


def _disassembled(cubin: Path, name: str) -> str:
    """nvdisasm's listing of one kernel, its labels turned into addresses."""
    shown = subprocess.run([tool("nvdisasm"), "-hex", "-sf", cubin], capture_output=True, text=True, check=True).stdout
    part = shown.split(f".text.{name}:", 1)[1].split(".section", 1)[0]
    labels, waiting = {}, []
    for line in part.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            waiting.append(label[1])
        elif address := re.match(r"\s*/\*([0-9a-f]{4,})\*/", line):
            labels |= dict.fromkeys(waiting, f"0x{int(address[1], 16):x}")
            waiting = []
    return re.sub(r"`\((\.L_\w+)\)", lambda label: labels.get(label[1], "0x0"), part)


def tutorial(row: Row) -> Kernel:
    import tutorial_attention

    from sora_fast.testing import aot

    d, block_m, block_n, warps, stages = map(int, row.pattern.split())
    cc = GPUS[row.gpu].cc
    signature = {**dict.fromkeys(("q", "k", "v", "out"), "*fp16"), "lse": "*fp32", "scale": "fp32", "length": "i32",
                 **dict.fromkeys(("D", "BLOCK_M", "BLOCK_N", "TMA"), "constexpr")}
    made = aot.compile_for(tutorial_attention.forward_kernel, signature, dict(D=d, BLOCK_M=block_m, BLOCK_N=block_n,
                           TMA=cc >= 90), ("q", "k", "v", "out", "lse", "length"), cc, num_warps=warps, num_stages=stages)
    return Kernel(row.kernel, made.sass, made.registers, made.shared, warps, stages=stages,
                  bulk=4 * block_n * d if cc >= 90 else 0.0)


def kernel(row: Row) -> tuple[Kernel, dict]:
    """The kernel, and where it came from."""
    if not row.wheel:
        import triton

        return tutorial(row), {"compiled with": f"Triton {triton.__version__}"}
    folder, digest = download(row.wheel)
    for library in list(folder.rglob("*.so")):
        extract(library)
    _, text, registers = listing(folder, row.pattern)
    # Roles have registers and warps of their own: of what computes, so many blocks as its authors say are resident.
    shared = GPUS[row.gpu].shared // row.resident - 1024 * 2
    return (Kernel(row.kernel, text, min(registers, 65536 // row.resident // row.warps // 32 // 8 * 8), shared, row.warps,
                   bulk=row.bulk), {"wheel": row.wheel, "sha256": digest})


def measure(row: Row) -> dict:
    made, origin = kernel(row)
    found = predict(made, GPUS[row.gpu])
    return dict(kernel=row.kernel, gpu=GPUS[row.gpu].name, cc=GPUS[row.gpu].cc, kind=row.kind, causal=row.causal,
                predicted=round(found.tflops, 1), bound=round(found.bound_tflops, 1), binding=found.binding,
                cycles=round(found.cycles), published=row.published, error=round(found.tflops / row.published - 1, 3),
                fitted=row.fitted, source=row.source, **origin)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help="keep the downloads (default: delete them)")
    parser.add_argument("--only", default="", metavar="TEXT", help="print rows that contain TEXT, write nothing")
    arguments = parser.parse_args()
    found = []
    try:
        for row in rows():
            if arguments.only in f"{row.gpu} {row.kernel}":
                found.append(measure(row))
                limit = 0.1 if row.kind == "forward" else 0.15
                print("{kernel}, {gpu}: predicted {predicted:.0f}, published {published:.0f}: {error:+.1%}{miss}".format(
                    **found[-1], miss="" if abs(found[-1]["error"]) <= limit else "  MISS"), flush=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(FOLDER, ignore_errors=True)
    if not arguments.only:
        FILE.write_text(json.dumps({"rows": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
