"""What our kernels' machine code is held to beside registers and spills.

Copies at least a turn ahead, no division and no local memory in a main loop, blocks per SM; of kernels whose time is
memory's, how long their instructions take to be issued, in percent of DRAM's time, which may fall. structure.json lists
today's faults with why they are known; a new one fails, and so does one that is gone and still listed.

    python tests/structure.py              # writes structure.json anew, keeping the reasons; minutes
    python tests/structure.py modulation   # of these families alone
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import triton

from sora_fast.cli.predict_kernels import MEMORY, Work
from sora_fast.cyclemodel import GPUS, blocks_per_sm, facts, sass
from sora_fast.cyclemodel.model import issue_over_dram
from sora_fast.testing import aot

FILE = Path(__file__).with_name("structure.json")
TABLE = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"triton": triton.__version__, "kernels": {}}
GPU = {90: GPUS["h200"], 80: GPUS["a100"]}


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
    FILE.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
