"""Every barrier, wait and fence of the pipelined kernels, removed one at a time and in pairs: does the emulator notice?

``python tests/emulator_removals.py [target ...]`` runs the study and writes emulator_removals.md beside it. A kernel is run
as it is; then, from the same memory, with one instruction of its PTX removed. A removal is caught by a finding, a fault, or
a bit of the results, with copies and MMAs as late and as early as the ISA allows. What is not caught alone is removed
together with other such places: where that is caught, one covers the other. What is left can be removed all at once and
nothing is noticed: it orders nothing for this launch. ARGUMENTS says why.
"""

import argparse
import copy
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".md")

# What is removed: a pattern, and what stands in its place. A wait for an mbarrier becomes "it has completed".
KINDS = {
    "bar.sync": (r"bar\.sync\s+\d+(, *\d+)?;", ""),
    "bar.warp.sync": (r"bar\.warp\.sync\s+[^;]*;", ""),
    "cp.async.wait_group": (r"cp\.async\.wait_group\s+\w+\s*;", ""),
    "cp.async.bulk.wait_group": (r"cp\.async\.bulk\.wait_group(\.read)?\s+\w+\s*;", ""),
    "wgmma.wait_group": (r"wgmma\.wait_group\.sync\.aligned\s+\d+;", ""),
    "wgmma.fence": (r"wgmma\.fence\.sync\.aligned;", ""),
    "fence.proxy.async": (r"fence\.proxy\.async[\w:.]*\s*;", ""),
    "fence.proxy.tensormap": (r"fence\.proxy\.tensormap[^;]*;", ""),
    "fence.mbarrier_init": (r"fence\.mbarrier_init[\w.]*;", ""),
    "mbarrier.try_wait": (r"mbarrier\.try_wait[\w.:]*\s+(?P<p>[%\w]+),[^;]*;", "setp.eq.u32 {p}, 0, 0;"),
}
GUARD = r"(@!?\s*[%\w]+\s+)?"


@dataclass(frozen=True)
class Place:
    kind: str
    number: int  # of its kind, in the order of the text
    start: int
    stop: int
    instead: str
    loc: str

    @property
    def label(self) -> str:
        return f"{self.kind} #{self.number}"


def places(ptx: str) -> list[Place]:
    """The synchronisation of a kernel, in the order of the text."""
    files = {number: name.rpartition("/")[2] for number, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx)}
    lines = [(m.start(), f"{files.get(m[1], m[1])}:{m[2]}") for m in re.finditer(r"\.loc\s+(\d+)\s+(\d+)", ptx)]
    found = []
    for kind, (pattern, instead) in KINDS.items():
        for number, match in enumerate(re.finditer(GUARD + pattern, ptx)):
            new = instead.format(**match.groupdict()) if "{" in instead else instead
            loc = next((text for start, text in reversed(lines) if start < match.start()), "")
            found.append(Place(kind, number, match.start(), match.end(), new, loc))
    return sorted(found, key=lambda place: place.start)


def without(ptx: str, removed) -> str:
    for place in sorted(removed, key=lambda place: -place.start):
        ptx = ptx[: place.start] + place.instead + ptx[place.stop :]
    return ptx


class Study:
    """One launch of a kernel, to be repeated with other PTX while its tensors live."""

    def __init__(self, ptx: str, grid, block, params, allocations, shared):
        from sora_fast.emulator.launches import _Snapshot

        self.ptx, self.grid, self.block, self.params, self.shared = ptx, grid, block, params, shared
        self.allocations, self.before, self.right = allocations, _Snapshot(allocations), None
        if verdict := self.verdict(ptx):
            raise RuntimeError(f"emulator_removals: the kernel as it is: {verdict}")

    def verdict(self, ptx: str) -> str:
        """What is noticed: "" for nothing. The first run of all is what the results should be."""
        from sora_fast.emulator.codegen import Program
        from sora_fast.emulator.launches import _Snapshot
        from sora_fast.emulator.machine import Launch, Schedule
        from sora_fast.emulator.memory import Fault
        from sora_fast.emulator.ptx import parse

        (kernel,) = parse(ptx).values()
        program = Program(kernel)
        for schedule, race in ((Schedule(), True), (Schedule(when="early"), False), (Schedule(3, "random"), False)):
            self.before.restore()
            allocations = copy.deepcopy(self.allocations)
            try:
                launch = Launch(program, self.grid, self.block, self.params(program), allocations, shared=self.shared,
                                schedule=schedule, race=race)  # fmt: skip
            except Fault as fault:
                return "; ".join(dict.fromkeys(kind for kind, _ in fault.findings)) or shorten(str(fault))
            if launch.findings:
                return "; ".join(dict.fromkeys(kind for kind, _ in launch.findings))
            after = _Snapshot(self.allocations)
            if self.right is None:
                self.right = after
            elif self.right.difference(after):
                return "wrong results"
        return ""


def shorten(text: str) -> str:
    return "deadlock" if "deadlock" in text else re.sub(r".*?: ", "", text.partition(", in `")[0], count=1)[:80]


def attention(backward: bool):
    from sora_fast import ops

    torch.manual_seed(0)
    cu = lambda *n: torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32)
    q, k, v = (torch.randn(n, 1, 128).bfloat16().requires_grad_(backward) for n in (150, 300, 300))
    out = ops.varlen_attention(q, k, v, cu(130, 20), cu(230, 70), 130, 230, backend="triton")
    return torch.autograd.grad(out, (q, k, v), torch.randn_like(out)) if backward else out


def convolution(backend: str):
    from sora_fast import ops

    torch.manual_seed(0)
    shape = (128, 128, 3, 1, 1) if backend == "triton" else (96, 96, 3, 3, 3)
    x = torch.randn(1, shape[1], 3, 4, 9).bfloat16()
    return ops.causal_conv3d(x, torch.randn(shape).bfloat16() / 20, torch.randn(shape[0]).bfloat16(), backend=backend)


TARGETS = {
    "attention forward, E = 128": (lambda: attention(False), "forward_kernel"),
    "attention dk and dv, E = 128": (lambda: attention(True), "dkdv_kernel"),
    "convolution, Triton with TMA": (lambda: convolution("triton"), "tma_kernel"),
    "convolution, csrc": (lambda: convolution("cuda"), "causal_conv3d_kernel"),
}

# Why a place orders nothing, by kind. "The rest" are the other places of its table that order nothing.
ARGUMENTS = {
    "bar.sync": "the race detector, which orders every access, finds none unordered without it, the rest gone too",
    "bar.warp.sync": "it orders no memory but brings a warp together for wgmma; the emulator does so where paths meet",
    "wgmma.fence": "only wgmma of one shape have touched the accumulators since the fence before (PTX ISA 9.7.15.7.1)",
    "cp.async.wait_group": "what is in flight there is for tiles nobody reads, in stages nobody touches again",
    "cp.async.bulk.wait_group": "no bulk group is in flight: TMA loads complete on mbarriers, and there is no bulk store",
    "fence.proxy.async": "nothing is written through the generic proxy between the fence before it and this one",
}
NEAR = 3  # places around a covered one that are tried first, each alone
CACHE: Path | None = None  # verdicts of an earlier run that was cut off


def study(name: str, judge=None) -> list[tuple[Place, str]]:
    """(place, what happens without it) for every place of a target, in the middle of its first launch.

    ``judge(name, Study)`` finds the rows; rows_of does, unless another is given.
    """
    from sora_fast.emulator import launches
    from sora_fast.testing import emulated_gpu

    call, wanted = TARGETS[name]
    rows = []

    execute = launches.Emulator.execute

    def studied(emulator, kernel, ptx, *launch):
        if wanted in kernel and not rows:
            rows.extend((judge or rows_of)(name, Study(ptx, *launch)))
        return execute(emulator, kernel, ptx, *launch)

    with mock.patch.object(launches.Emulator, "execute", studied), emulated_gpu("sm90"):
        call()
    return rows


def rows_of(name: str, subject: Study) -> list[tuple[Place, str]]:
    every = places(subject.ptx)
    known = json.loads(CACHE.read_text()).get(name, {}) if CACHE and CACHE.exists() else {}

    def verdict(removed) -> str:
        key = " + ".join(place.label for place in sorted(removed, key=lambda place: place.start))
        if key not in known:
            known[key] = subject.verdict(without(subject.ptx, removed))
            print(f"{name}: {key}: {known[key] or '-'}", flush=True)
            if CACHE:
                rest = json.loads(CACHE.read_text()) if CACHE.exists() else {}
                CACHE.write_text(json.dumps({**rest, name: known}, indent=1))
        return known[key]

    found = {place: verdict([place]) for place in every}
    silent = [place for place, noticed in found.items() if not noticed]
    together: list[Place] = []  # as many as can be removed at once without notice
    groups: list[list[Place]] = []
    for place in silent:
        if verdict([*together, place]):
            cover = sorted(together, key=lambda one: abs(one.start - place.start))
            single = next((one for one in cover[:NEAR] if verdict([one, place])), None)
            cover = [single] if single else cover
            for one in reversed(cover[:]):  # the furthest first
                if len(cover) > 1 and verdict([place, *(other for other in cover if other is not one)]):
                    cover.remove(one)
            groups.append([place, *cover])  # of which any one is enough
        else:
            together.append(place)
    for place in silent:
        group = next((group for group in groups if place in group), None)
        if group:
            names = " and ".join(one.label for one in group if one is not place)
            found[place] = f"covered by {names}: without all of these, {verdict(group)}"
        else:
            found[place] = f"orders nothing: {ARGUMENTS.get(place.kind, 'NO ARGUMENT')}"
    return list(found.items())


def table(results: dict[str, list[tuple[Place, str]]], before: str = "") -> str:
    """``before``: an earlier table, which targets that were not run now stay from."""
    lines = ["# Synchronisation removed", "", "Made by `python tests/emulator_removals.py`, which says how.", ""]
    for name in TARGETS:
        if name not in results:
            part = before.partition(f"## {name}\n")[2].partition("\n## ")[0].rstrip("\n")
            lines += [f"## {name}", part, ""] if part else []
            continue
        rows = results[name]
        alone = sum(not text.startswith(("covered", "orders")) for _, text in rows)
        covered = sum(text.startswith("covered") for _, text in rows)
        rest = len(rows) - alone - covered
        counts = f"{len(rows)} places: {alone} caught alone, {covered} covered by another, {rest} order nothing"
        lines += [f"## {name}", "", f"{counts}.", "", "| removed | line | what happens |", "| --- | --- | --- |"]
        lines += [f"| {place.label} | {place.loc} | {text} |" for place, text in rows]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    global CACHE
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"some of {list(TARGETS)}; all")
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--cache", type=Path, help="JSON file of verdicts, so that a run can be continued")
    args = parser.parse_args()
    CACHE = args.cache
    results, before = {}, args.out.read_text() if args.out.exists() else ""
    for name in args.targets or TARGETS:
        results[name] = study(name)
        args.out.write_text(table(results, before))  # after each target, lest a run that is cut off has made nothing


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    torch.set_num_threads(1)
    main()
