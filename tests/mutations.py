"""Faults to plant in the source, and the tests that must find each: ``python tests/mutations.py [word ...]``.

Tests that are thinned or moved must still bite. Each fault is planted in a copy of the checkout, one at a time; its guard
runs there and must fail. ``full`` guards are what .ci/run adds to the default tests. Words choose faults by their text.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "out", "__pycache__", "*.egg-info", ".pytest_cache",
                                  ".hypothesis")


@dataclass(frozen=True)
class Fault:
    what: str
    file: str
    old: str  # stands in the file once
    new: str
    guard: str  # arguments of pytest


FAULTS = [
    Fault("definition: a rotation turns the wrong way", "sora_fast/reference/rotary.py",
          "a, b = a * cos - b * sin, a * sin + b * cos", "a, b = a * cos + b * sin, b * cos - a * sin",
          "tests/test_rotary.py"),
    Fault("definition: a strided convolution ignores its phase", "sora_fast/reference/convolution.py",
          "F.conv3d(padded[:, :, phase:], weight", "F.conv3d(padded[:, :, : padded.shape[2] - phase], weight",
          "tests/test_convolution.py"),
    Fault("definition: attention sees the next sample's keys", "sora_fast/reference/attention.py",
          "mask = inside & (seg_q[:, None] == seg_k[None, :])", "mask = inside & (seg_q[:, None] >= seg_k[None, :])",
          "tests/test_op_wrappers.py"),  # on a CPU only a traced graph takes the whole pack at once
    Fault("torch backend: attention ignores a mask's left edge", "sora_fast/ops/attention_torch.py",
          "return _cpu_sample_by_sample(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, window, hook)",
          "return _cpu_sample_by_sample(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, (-1, window[1]), hook)",
          "tests/test_attention.py"),
    Fault("kernel: attention drops the mask of the last key", "kernels/attention_tiles.py",
          "visible = key < k_len\n", "visible = key <= k_len\n", "tests/test_emulated_core.py"),
    Fault("kernel: a strided convolution's gradient begins at the first tap", "kernels/convolution_backward.py",
          "first_t, latest = (distance % ST).to(tl.int32), distance // ST",
          "first_t, latest = (distance % ST * 0).to(tl.int32), distance // ST", "tests/test_emulated_core.py"),
    Fault("kernel: a rotation turns the wrong way", "kernels/rotary.py",
          "a, b = turn(a, b,", "a, b = turn_back(a, b,", "tests/test_emulated_core.py"),
    Fault("kernel: modulation reads tokens of no sample", "kernels/modulation.py",
          "valid = in_bounds & (row >= 0)  # tokens outside every sample are not loaded", "valid = in_bounds",
          "tests/test_emulated_core.py"),
    Fault("kernel: height and width of a patch's place are swapped", "kernels/patches.py",
          "(inner // w % h) * (PH * row) + (inner % w).to(tl.int64) * PW",
          "(inner % h) * (PH * row) + (inner // h % w).to(tl.int64) * PW", "tests/test_emulated_core.py"),
    Fault("kernel: a group norm forgets how long a run is", "kernels/normalization.py",
          "sum_RG += load_f32(squares + offset, in_bounds) + diff * diff * count",
          "sum_RG += load_f32(squares + offset, in_bounds) + diff * diff", "tests/test_emulated_core.py"),
    Fault("pack: rows of frames are counted by height", "sora_fast/pack.py",
          "(first_row[segment_ids[inside].long()] + coords[inside, 0])",
          "(first_row[segment_ids[inside].long()] + coords[inside, 1])", "tests/test_pack.py"),
    Fault("packer: a pair may be a token too large", "sora_fast/data/packing.py",
          "            if rest < 0:\n                high -= 1", "            if rest < -1:\n                high -= 1",
          "tests/test_packing.py"),
    Fault("training: the EMA stays where it began", "sora_fast/training/loop.py",
          "distributed.locals_of(self.parameters), 1 - decay)", "distributed.locals_of(self.parameters), 0.0)",
          "tests/test_training.py tests/test_training_tasks.py"),
    Fault("checkpoints: a damaged file is read as an empty one", "sora_fast/training/checkpoint.py",
          "as error:  # SafetensorError has no public name\n        raise ValueError(",
          "as error:  # SafetensorError has no public name\n        return {}\n        raise ValueError(",
          "tests/test_training.py tests/test_checkpoints.py"),
    Fault("streams: a layer forgets its phase between chunks", "sora_fast/nn/convolution.py",
          "phase + y.shape[2] * self.stride[0] - x.shape[2]))", "self.phase))", "tests/test_vae_stream.py tests/test_nn.py"),
    Fault("accelerate: Wan's downsampling begins a frame early", "sora_fast/integrations/wan_vae.py",
          "_convolve(self.time_conv, x, state, phase=2)", "_convolve(self.time_conv, x, state, phase=1)",
          "tests/test_accelerate_wan_vae.py"),
    Fault("diffusion: the velocity points backwards", "sora_fast/diffusion/objectives.py",
          '{"velocity": noise - x0,', '{"velocity": x0 - noise,', "tests/test_diffusion.py"),
    Fault("sampling: guidance pushes the wrong way", "sora_fast/diffusion/sampling.py",
          "predicted = null + guidance * (wanted - null)", "predicted = wanted + guidance * (null - wanted)",
          "tests/test_diffusion.py tests/test_generation.py"),
    Fault("DiT: shift and scale are swapped before the MLP", "sora_fast/models/dit.py",
          "        shift, scale, gate = rest\n", "        scale, shift, gate = rest\n", "tests/test_dit.py"),
    Fault("compat: flash-attn's window is dropped", "sora_fast/compat/flash_attn.py",
          "window=tuple(window_size),", "window=(-1, -1),", "tests/test_compat.py"),
    Fault("records: a changed kernel still counts as validated", "sora_fast/records.py",
          'same = [r for r in found if r["kernel_hash"] == code]', "same = list(found)", "tests/test_records.py"),
    Fault("csrc: rows of taps are walked back one short", "csrc/convolution_index.h",
          "k->row -= s.kh;", "k->row -= s.kh - 1;", "tests/test_cuda_convolution.py"),
    Fault("compare: slower is called faster", "benchmarks/compare.py",
          'return ("SLOW" if side > 0 else "FAST"), ""', 'return ("FAST" if side > 0 else "SLOW"), ""',
          "tests/test_bench_report.py"),
    Fault("evaluation: flicker is not seen", "sora_fast/evaluation/metrics.py",
          "decibels(float(error.diff(dim=0).square().mean()), peak)", "decibels(float(error.square().mean()), peak)",
          "tests/test_evaluation.py"),
    Fault("ranks: each takes the first packs of a step", "sora_fast/training/distributed.py",
          "return values[rank() :: size()]", "return values[: len(values) // size()]",
          "-m full tests/test_distributed.py"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("words", nargs="*", help="only the faults whose text has one of these")
    words = parser.parse_args().words
    missed = []
    for fault in FAULTS:
        if words and not any(word in fault.what for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "checkout")
            shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
            path = copy / fault.file
            text = path.read_text("utf-8")
            if text.count(fault.old) != 1:
                sys.exit(f"{fault.what}: {fault.file} must have {fault.old!r} once, got {text.count(fault.old)} times")
            path.write_text(text.replace(fault.old, fault.new), "utf-8")
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *fault.guard.split()]
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        failed = [line.partition(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if done.returncode != 1 or not failed:
            missed.append(fault.what)
        print(f"{'found' if failed else 'MISSED':7} {fault.what}: {', '.join(failed) or done.stdout[-300:]}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
