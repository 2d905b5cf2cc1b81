"""Measured rows that stand beside predictions: of the same GPU, op, direction, dtype and sizes, timed behind a passed gate.

A row is of a whole call. It is compared where one kernel does the call's work: forwards, a convolution's dgrad and wgrad.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import benchmarks
from ..benchmarks import figures, rows
from ..cyclemodel import GPU, Prediction

RESULTS = Path(benchmarks.__path__[0]) / "results"
DTYPES = {"*bf16": "bfloat16", "*fp16": "float16", "*fp32": "float32"}


@dataclass(frozen=True)
class Call:
    """What a row must say to be of a kernel; ``shape``: those of its sizes that the kernel was compiled for."""

    op: str
    direction: str
    provider: str
    dtype: str
    shape: Mapping[str, object]

    def is_of(self, row: Mapping) -> bool:
        mine = self.op, self.direction, self.provider, self.dtype
        if mine != (row["op"], row["direction"], row["provider"], row["dtype"]):
            return False
        shape = dict(row["shape"])
        if self.op == "varlen_attention":
            shape["group"] = shape["heads"] // shape["key_heads"]
        return all(shape.get(name) == value for name, value in self.shape.items())


@dataclass(frozen=True)
class Measured:
    case: str
    device: str
    time: str  # when, as ISO 8601 has it
    tflops: float | None
    copy_share: float | None  # of the measured copy rate
    error: float  # predicted over measured, less one

    def to_dict(self) -> dict:
        return asdict(self)


def call_of(family: str, kernel: str, constants: Mapping, signature: Mapping[str, str]) -> Call | None:
    """The call whose work is this Triton kernel's alone; None where several share it, or a size is not known."""
    value = constants.get
    there = lambda name: signature.get(name, "").startswith("*")
    dtype = lambda name: DTYPES.get(signature.get(name, ""), "")
    made = lambda op, direction, output, **shape: Call(op, direction, "triton", dtype(output), shape)
    if family == "convolution" and "KT" in constants:
        kernel_size = [value("KT"), value("KH"), value("KW")]
        if "MADE" in constants:
            ends = ("Cin", "Cout") if value("TRANSPOSED") else ("Cout", "Cin")
            sizes = dict(zip(ends, (value("MADE"), value("SUMMED")), strict=True)) | dict(stride=[1, 1, 1], upsample=1)
            return made("causal_conv3d", "dgrad" if value("TRANSPOSED") else "forward", "out", kernel=kernel_size, **sizes)
        stride, upsample = ([1, 1, 1], 1) if "O0" in constants else ([value("ST"), value("SH"), value("SW")], value("UP"))
        direction, output = {"forward_kernel": ("forward", "y"), "dgrad_kernel": ("dgrad", "dx"),
                             "wgrad_kernel": ("wgrad", "dy"), "wgrad_tma_kernel": ("wgrad", "dy")}[kernel]
        return made("causal_conv3d", direction, output, kernel=kernel_size, Cin=value("CIN"), Cout=value("COUT"),
                    stride=stride, upsample=upsample)
    if family == "patches" and kernel == "embed_kernel":
        return made("patch_embed", "forward", "out", width=value("D"), channels=value("C"),
                    patch=[value("PT"), value("PH"), value("PW")])
    if kernel != "forward_kernel":
        return None
    if family == "attention" and not value("LEFT"):
        return made("varlen_attention", "forward", "out", head_dim=value("E"), group=value("GROUP"),
                    causal=bool(value("RIGHT")), window=[-1, -1])
    if family == "normalization" and value("NORM") == "rms":
        return made("norm_act", "forward", "y", C=value("C"), norm="rms")
    if family == "modulation":
        sizes = dict(width=value("D"), stream=dtype("x"), modulation=dtype("gate") or dtype("shift"))
        if not there("h"):
            return made("gate_residual", "forward", "y", **sizes)
        return made("gate_residual_norm_modulate" if there("y") else "norm_modulate", "forward", "h", norm=value("NORM"),
                    affine=there("weight"), **sizes)
    if family == "rotary":
        return made("qk_norm_rope", "forward", "q_out", heads=value("H"), head_dim=value("E"), norm=value("NORM"),
                    pairing=value("PAIRING"))
    return None


def read(folder: Path, gpu: GPU) -> list[dict]:
    """The time rows of this GPU under ``folder``/<gpu>, those with a time, of two of the same thing the later."""
    found = [row for path in sorted(folder.glob("*/bench*.jsonl")) for row in rows.read(path)]
    ours = [row for row in found if row["row"] == "time" and re.search(rf"\b{gpu.name}\b", row["environment"]["device"])]
    ours.sort(key=lambda row: str(row["environment"].get("time", "")))
    return [row for row in figures.measurements(ours) if row["status"] == "PASSED"]


def beside(prediction: Prediction, call: Call | None, measurements: Sequence[Mapping]) -> list[Measured]:
    """The rows of the call that ``prediction``'s kernel does, each with how far the prediction is off."""
    found = []
    for row in measurements:
        if call is None or not call.is_of(row):
            continue
        tflops = row["flops"] / row["median_ms"] * 1e-9 if prediction.tflops is not None else None
        share = row["share"] if tflops is None and row["roof"] == "copy" else None
        if not (tflops or share):
            continue
        error = prediction.tflops / tflops - 1 if tflops else prediction.copy_share / share - 1
        here = row["environment"]
        found.append(Measured(row["case"], here["device"], str(here.get("time", "")), tflops, share, error))
    return found
