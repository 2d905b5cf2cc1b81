"""Tables between markers in README.md and docs/, brought up to date from committed files."""

from functools import partial
from pathlib import Path

from sora_fast.files import save_text

from . import evidence, kernel_tables, tables

ROOT = evidence.KERNELS.parent


def pages(root: Path = ROOT) -> list[Path]:
    """Every page with tables made of committed files."""
    return [root / "README.md", root / "docs" / "measured.md", *sorted((root / "docs" / "kernels").glob("*.md"))]


def update(path: str | Path, check: bool = False, results_folder: str | Path | None = None) -> None:
    """Write the tables between their markers in ``path``, a page; with ``check`` raise ValueError if they are not there."""
    path, results = Path(path), Path(__file__).parent / "results" if results_folder is None else Path(results_folder)
    makers = {"evidence": lambda: evidence.block(results), "measured": lambda: tables.readme_block(results, brief=True),
              "measured in full": lambda: tables.readme_block(results)}
    makers |= {f"kernels of {family}": partial(kernel_tables.block, family) for family in evidence.FAMILIES}
    text = wanted = path.read_text(encoding="utf-8")
    names = [name for name in makers if f"<!-- {name}: begin -->" in text]
    for name in names:
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = wanted.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"bench readme: expected {end} after {begin} in {path}, got none; put it back")
        wanted = f"{before}{begin}\n{makers[name]()}\n{end}{after}"
    if not names:
        raise ValueError(f"bench readme: expected <!-- measured: begin --> or another marker in {path}, got none; put it "
                         f"back")
    if wanted != text and check:
        raise ValueError(f"bench readme: expected the tables of {path} to be those of the committed results, got others; "
                         f"run sora-fast bench readme")
    if wanted != text:
        save_text(path, wanted)
