"""kernels/PROOF.md and its rows: of the kernels as they stand, and what a drawn row says still holds."""

import json
import random

import pytest
from kernel_checks import Guarded, Short

pytest.importorskip("triton")
import proof  # noqa: E402

from sora_fast import records  # noqa: E402
from sora_fast.kernels import patches  # noqa: E402

pytestmark = [pytest.mark.full, pytest.mark.ci]

ROWS = proof.rows()
CURRENT = [row for row in ROWS if row["triton"] in (None, records.triton_minor())]


def test_rows_are_of_the_kernels_as_they_stand():
    """After a change of a kernel: python tests/proof.py drops its rows and makes them anew."""
    stale = sorted({row["kernel"] for row in ROWS if row["backend"] == "triton" and not proof.is_current(row)})
    assert not stale, f"expected rows of these kernels' present hashes, got others of {', '.join(stale)}: run tests/proof.py"
    assert ROWS and all(row["row"] == "proof" and "arch" not in row and row["emulated"] for row in ROWS)
    assert all(row["passed"] or row["refused"] for row in ROWS), "kernels/PROOF.md lists what fails"
    assert len({proof.key_of(row) for row in ROWS}) == len(ROWS)


def test_the_table_is_made_of_the_rows():
    said = proof.TABLE.read_text(encoding="utf-8")
    passed = sum(row["passed"] for row in ROWS)
    assert f"\n{passed:,} calls pass" in said and f"{sum(row['instructions'] for row in ROWS):,} warp instructions" in said
    lines = [line for line in said.splitlines() if line.startswith("| ") and "emulated" not in line and "---" not in line]
    counted = [int(cell.split(" of ")[0]) for line in lines for cell in line.split(" | ") if " of " in cell]
    assert sum(counted) == passed


def test_a_drawn_row_still_holds():
    """Another one each time, of those that took least."""
    if not CURRENT:
        pytest.skip(f"the rows are of another Triton than {records.triton_minor()}")
    cheap = sorted((row for row in CURRENT if row["passed"] and row["backend"] == "triton"), key=lambda row: row["seconds"])
    row = random.SystemRandom().choice(cheap[:len(cheap) // 2 + 1])
    (call,) = [call for call in proof.calls() if call.key() == proof.key_of(row)]
    again = proof.prove(call)
    assert again["passed"] and again["error"] == row["error"] and again["launches"] == row["launches"], (row, again)


def test_only_missing_rows_are_run(monkeypatch, tmp_path, capsys):
    """Stopped and begun again, with rows of changed kernels among them, of which one launches what it did; one fails."""
    monkeypatch.setattr(proof, "ROWS", tmp_path / "proof.jsonl")
    monkeypatch.setattr(proof, "TABLE", tmp_path / "PROOF.md")
    some = [call for call in proof.calls() if call.op == "unpatchify" and call.arch == "sm90"][:3]
    monkeypatch.setattr(proof, "calls", lambda: some)
    ran = []

    def prove(call):
        ran.append(call)
        row = dict(zip(proof.KEY, call.key(), strict=True))
        return row | dict(kernel=call.kernel, passed=call is not some[2], refused=None, failure="wrong", instructions=1,
                          seconds=0)

    monkeypatch.setattr(proof, "prove", prove)
    monkeypatch.setattr("sys.argv", ["proof.py", "--minutes", "0"])
    assert proof.main() == 0 and ran == some[:1]
    assert proof.main() == 0 and ran == some[:2]
    rows = proof.rows()
    monkeypatch.setattr(proof, "launches_alike", lambda row, call: call is some[1])
    proof.ROWS.write_text("".join(json.dumps(row | dict(kernel_hash="old")) + "\n" for row in rows))
    assert proof.main() == 0 and ran == some[:2] and len(proof.rows()) == 1  # stopped: one is dropped, one not looked at
    monkeypatch.setattr("sys.argv", ["proof.py"])
    assert proof.main() == 1 and ran == [*some[:2], some[0], some[2]]
    table = proof.TABLE.read_text()
    assert "2 calls pass" in table and "**1 fail**" in table and "wrong" in table


def test_a_wrong_kernel_is_no_proof(monkeypatch):
    """The last program left out: the row says that it failed, and no row of before holds on."""
    call = next(call for call in proof.calls() if call.op == "unpatchify" and not call.race)
    right = proof.prove(call)
    assert right["passed"] and proof.launches_alike(right, call)
    monkeypatch.setattr(patches, "permute_kernel", Short(patches.permute_kernel))
    monkeypatch.setattr(patches, "torch", Guarded())
    row = proof.prove(call)
    assert not row["passed"] and not row["refused"] and not proof.launches_alike(right, call)
