"""What our kernels' machine code is held to beside registers and spills.

Copies at least a turn ahead, no division and no local memory in a main loop, blocks per SM; of kernels whose time is
memory's, how long their instructions take to be issued, in percent of DRAM's time, which may fall. structure.json lists
today's faults with why they are known; a new one fails, and so does one that is gone and still listed. Under "rows" stands
how long row kernels at widths of models take to be issued on an H200, in percent of DRAM's time, which may fall too.

    python tests/structure.py              # writes structure.json anew, keeping the reasons; minutes
    python tests/structure.py modulation   # of these families alone
"""

import json
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton

from sora_fast.cli.predict_kernels import MEMORY, Work, tensor_bytes
from sora_fast.cyclemodel import GPUS, blocks_per_sm, facts, sass
from sora_fast.cyclemodel.model import issue_over_dram
from sora_fast.testing import aot
from sora_fast.testing.launches import modulation, normalization, patches, rotary

FILE = Path(__file__).with_name("structure.json")
TABLE = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"triton": triton.__version__, "kernels": {}}
GPU = {90: GPUS["h200"], 80: GPUS["a100"]}
ROWS = {  # of aot_cases, beside the widest below
    "modulation": (modulation, ("1152, bfloat16", "3072, affine", "3072, gate")),
    "normalization": (normalization, ("192, bfloat16", "384, bfloat16")),
    "patches": (patches, ("latents, 5120, sm90", "48 channels, 3072, sm90", "128 channels, 2048, float16, sm90",
                          "16 channels", "48 channels")),
    "rotary": (rotary, ("16 x 72", "Mochi", "CogVideoX 5B", "Hunyuan", "Wan 14B")),
}


def family(result: aot.Result) -> str:
    """attention of sora_fast.kernels.attention_backward."""
    return result.case.fn.__module__.rpartition(".")[2].partition("_")[0]


def read(case: aot.AotCase, compiled: aot.Compiled, cc: int) -> facts.Facts:
    warps, stages = case.options.get("num_warps", 4), case.options.get("num_stages", 3)
    blocks, limit = blocks_per_sm(GPU[cc], compiled.registers, compiled.shared, warps)
    return facts.read(max(sass.functions(compiled.sass), key=len), blocks, limit, warps, stages)


def entry(result: aot.Result) -> dict:
    found = read(result.case, result.compiled, result.cc)
    made = {"case": result.case.name.partition(":")[0], "blocks": found.blocks, "limit": found.limit}
    if family(result) in MEMORY:
        kernel = Work(family(result), result.case, {}, launches=lambda: None, place=0).of(result.compiled)
        made["issue"] = round(100 * issue_over_dram(kernel, GPU[result.cc]))
    return made | {"faults": dict.fromkeys(found.faults(), "")}


def violations(results: Iterable[aot.Result], table: dict = TABLE) -> list[str]:
    """What differs from the table, in sentences; nothing for architectures and Tritons that it is not of."""
    found, seen = [], {}
    if table["triton"] != triton.__version__:
        return []
    for result in results:
        if result.cc not in GPU or result.compiled is None:
            continue
        place = seen.setdefault((f"sm_{result.cc}", family(result)), set())
        kernel, got = result.case.fn.__name__, entry(result)
        place.add(kernel)
        name = f"{family(result)} {kernel}, {got['case']}, sm_{result.cc}"
        known = table["kernels"].get(f"sm_{result.cc}", {}).get(family(result), {}).get(kernel)
        if known is None:
            found.append(f"{name}: expected it in tests/structure.json, got no entry; run python tests/structure.py.")
            continue
        for fault in got["faults"]:
            if fault not in known["faults"]:
                found.append(f"{name}: expected no {fault} fault, got one; mend it, or list it with its reason.")
        for fault in known["faults"]:
            if fault not in got["faults"]:
                found.append(f"{name}: expected the listed {fault} fault, got none; take it off the list.")
        if got.get("issue", 0) > known.get("issue", 0):
            found.append(f"{name}: expected at most {known.get('issue', 0)}% of DRAM's time for its instructions, got "
                         f"{got['issue']}%; use fewer, or state it if it is wanted.")
        if (got["blocks"], got["limit"]) != (known["blocks"], known["limit"]):
            found.append(f"{name}: expected {known['blocks']} blocks an SM, limited by {known['limit']}, got "
                         f"{got['blocks']}, limited by {got['limit']}; state it if it is wanted.")
    for (cc, room), kernels in seen.items():
        for gone in sorted(table["kernels"].get(cc, {}).get(room, {}).keys() - kernels):
            found.append(f"{room} {gone}, {cc}: expected the listed kernel, got none; take it off the list.")
    return found


def _row_calls(family: str) -> Iterator[tuple[str, partial]]:
    module, names = ROWS[family]
    yield from ((name, call) for name, call, _ in module.aot_cases() if name in names)
    bf16 = torch.bfloat16
    if family == "modulation":
        yield "5376, bfloat16", partial(modulation.both, 5376, bf16, bf16, bf16, "layer", False)
    elif family == "patches":
        yield "latents, 5376, sm90", partial(patches.embedding, 16, (1, 2, 2), 5376, bf16, "sm90")
    elif family == "rotary":
        yield "42 x 128", partial(rotary.both, 42, 42, 128, bf16, "rms_all", "interleaved", "fixed", ("weight",))


def row_issue(family: str, direction: str) -> dict[str, int]:
    """Of each row kernel of a family, "forward" or "backward", the time to issue its instructions in percent of DRAM's."""
    found = {}
    for name, call in _row_calls(family):
        for case, launch in zip(aot.cases_of(name, call, {}), aot.launches(call), strict=True):
            kernel = case.fn.__name__
            forward = kernel in ("forward_kernel", "embed_kernel", "permute_kernel")
            if kernel == "reduce_slots_kernel" or forward != (direction == "forward"):
                continue
            ways = {True: " to tokens", False: " from tokens"}.get(case.constexprs.get("TO_TOKENS"), "")
            work = Work(family, case, tensor_bytes(launch), lambda: None, 0)
            found[f"{name}, {kernel}{ways}"] = round(100 * issue_over_dram(work.kernel(GPU[90]), GPU[90]))
    return found


def main(families: Iterable[str]) -> None:
    from sora_fast.testing.launches import FAMILIES

    kernels: dict = TABLE["kernels"] if families else {}
    for cc in GPU:
        for name in families or FAMILIES:
            first = list({case.fn.__name__: case for case in reversed(aot.ours(name)) if cc in case.ccs}.values())
            results, _ = aot.check_all(first, (cc,), 1)
            reasons = TABLE["kernels"].get(f"sm_{cc}", {}).get(name, {})
            made = kernels.setdefault(f"sm_{cc}", {})[name] = {}
            for result in results:
                got = entry(result)
                known = reasons.get(result.case.fn.__name__, {}).get("faults", {})
                got["faults"] = {fault: known.get(fault, "") for fault in got["faults"]}
                made[result.case.fn.__name__] = got
            print(f"sm_{cc} {name}: {len(results)} kernels", flush=True)
    rows = TABLE.get("rows", {})
    for name in ROWS:
        if not families or name in families:
            rows[name] = {direction: row_issue(name, direction) for direction in ("forward", "backward")}
            print(f"rows of {name}: {sum(map(len, rows[name].values()))} kernels", flush=True)
    made = {"triton": triton.__version__, "kernels": kernels, "rows": rows}
    FILE.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
