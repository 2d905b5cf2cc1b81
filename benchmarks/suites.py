"""Which cases and providers a suite has."""

from collections.abc import Sequence
from dataclasses import replace

from sora_fast.ops import FAMILIES

from .figures import MODEL
from .model import dit, vae
from .specs import spec

# torch.compile takes about ten seconds a case on a CPU, where all else of the quick suite takes some 80.
COMPILED_ON_A_CPU = ("norm_modulate", "norm_act")


def work(families: Sequence[str], suite: str, kind: str = "cuda", *, spare_compiling: bool = False) -> list[tuple]:
    """(family, case, providers) of ``suite`` in the order of the families, whole models last.

    ``families``: of which; none means all. ``kind``: the device's type, by which some providers are named.
    ``spare_compiling``: compile few cases of the quick suite.
    """
    known = (*FAMILIES, MODEL)
    unknown = [name for name in families if name not in known]
    if unknown:
        raise ValueError(f"bench: expected families among {', '.join(known)}, got {', '.join(unknown)}; check the name")
    found = []
    for family in families or known:
        if family == MODEL:
            found += [(MODEL, case, case.providers()) for case in (*vae.CASES, *dit.CASES) if suite in case.suites]
            continue
        cases = [case for case in spec(family).CASES if suite in case.suites]
        providers = {op: [replace(p, name=p.on_cpu) if kind == "cpu" and p.on_cpu else p for p in spec(family).providers(op)]
                     for op in {case.op for case in cases}}
        found += [(family, case, providers[case.op]) for case in cases]
    return _few_compiled(found) if spare_compiling and suite == "quick" else found


def _few_compiled(found: list[tuple]) -> list[tuple]:
    """The same work with torch.compile at the first case of a few ops only; elsewhere it says why it is not run."""
    compiled, limited = set(), []
    why = (f"On a CPU the quick suite compiles one case each of {' and '.join(COMPILED_ON_A_CPU)}: a compilation takes ten "
           f"seconds; --providers compile runs all.")
    for family, case, providers in found:
        if family != MODEL and (case.op not in COMPILED_ON_A_CPU or case.op in compiled):
            providers = [replace(p, unavailable=lambda *asked: why) if p.compiled else p for p in providers]
        compiled.add(case.op)
        limited.append((family, case, providers))
    return limited


def select(work: Sequence[tuple], case_text: str, provider_names: Sequence[str]):
    """Cases whose id contains ``case_text`` and providers among ``provider_names`` (all where none are named)."""
    chosen = []
    for family, case, providers in work:
        kept = [p for p in providers if not provider_names or p.name in provider_names]
        if kept and case_text.lower() in case.id.lower():
            chosen.append((family, case, kept))
    return chosen
