"""The cycle model on listings that are written by hand: what is read of them, and what each unit, barrier and copy costs."""

import dataclasses
import json
from pathlib import Path

import pytest

from sora_fast.cyclemodel import GPUS, Kernel, blocks_per_sm, calibration, facts, predict, sass, units, warp_paths
from sora_fast.cyclemodel.issue import Simulation
from sora_fast.kernels.arch import SHARED

H100, A100 = GPUS["h100"], GPUS["a100"]


def code(*lines: str, stall: int = 1, sets: int = 7, waits: int = 0) -> list[sass.Instruction]:
    """Instructions 16 bytes apart. A line may end in "# waits for 0" or "# sets 0": scoreboards, as ptxas encodes them."""
    found = []
    for number, line in enumerate(lines):
        text, _, control = line.partition("#")
        words = control.split()
        board = int(words[-1]) if words else 0
        found.append(sass.Instruction(16 * number, text.strip(), stall, board if "sets" in words else sets, 7,
                                      1 << board if "waits" in words else waits))
    return found


def listing(*lines: str) -> str:
    high = "000fe20000000000"  # stall count 1, no scoreboard
    return "Function : example\n" + "\n".join(
        f"/*{16 * number:04x}*/ {line.partition('#')[0]} ; /* 0x0000000000000000 */\n/* 0x{high} */"
        for number, line in enumerate(lines))


# A loop as Triton writes it for sm_80: a copy, its group, a wait that leaves LEFT groups, a product.
def pipelined(left: int, *more: str) -> list[str]:
    return ["MOV R1, c[0x0][0x28]", f"DEPBAR.LE SB0, {left:#x}", "BAR.SYNC.DEFER_BLOCKING 0x0",
            "LDSM.16.M88.4 R4, [R2]", "HMMA.16816.F32.BF16 R8, R4, R6, R8", *more,
            "LDGSTS.E.BYPASS.128 [R3], [R10.64]", "LDGDEPBAR # sets 0", "@P0 BRA 0x10", "STG.E [R2], R8", "EXIT"]


def test_control_bits_are_read():
    # of a listing of ptxas: stall 4, scoreboard 0 set by the write and 1 held by the read, 2 waited for
    high = 4 << 41 | 0 << 46 | 1 << 49 | 0b100 << 52
    ((one,),) = sass.functions(f"Function : f\n/*0000*/ LDG.E.128 R4, [R2.64] ; /* 0x{0:016x} */\n /* 0x{high:016x} */")
    assert (one.stall, one.write_scoreboard, one.read_scoreboard, one.wait_mask, one.width) == (4, 0, 1, 4, 16)
    assert dataclasses.replace(one, text="@!P0 CALL.REL.NOINC 0x40").target == 0x40  # sm_80's way out of a loop
    assert dataclasses.replace(one, text="CALL.REL.NOINC 0x40").target is None


def test_cycles_of_units():
    path = code("FFMA R1, R2, R3, R4", "IMAD R1, R2, R3, R4", "LOP3.LUT R1, R2, R3, R4, 0xc0, !PT", "MUFU.EX2 R1, R2",
                "SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "LDS.128 R4, [R2]", "LDG.E.128 R4, [R2.64]",
                "HMMA.16816.F32.BF16 R8, R4, R6, R8")
    # 8 warps: two on each sub-partition
    assert units.cycles(path, H100, 8) == pytest.approx(dict(
        issue=16, fma=4, alu=4, xu=16, shfl=8, smem=8 * 512 / 128, L2=8 * 512 / 32, tensor=13))
    on_a100 = units.cycles(path, A100, 8)
    assert (on_a100["fma"], on_a100["tensor"]) == (8, 16)
    (product,) = code("HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8].tnspB, R24, gsb0")
    assert units.wgmma_shape(product) == (128, 16, True) and units.flops(product) * 4 == 2 * 64 * 128 * 16
    # a warpgroup's product at 4,096 FLOPs a clock; B goes through shared memory once for all its warps
    assert units.cycles([product], H100, 4) == pytest.approx(dict(issue=1, tensor=64, smem=128 * 16 * 2 / 128))
    # an atomic addition of 4 bytes a thread costs L2 three times a load
    (atomic,) = code("RED.E.ADD.F32.FTZ.RN [R2.64], R4")
    assert units.cycles([atomic], H100, 4)["L2"] == pytest.approx(3 * 4 * 128 / 32)


def test_a_turn_leaves_masks_out():
    one = code("MOV R1, RZ", "HMMA.16816.F32.BF16 R8, R4, R6, R8", "@P1 BRA 0x60", "FSEL R8, R8, R9, P2",
               "FSEL R9, R8, R9, P2", "FSEL R10, R8, R9, P2", "IADD3 R1, R1, 0x1, RZ", "@P0 BRA 0x10", "EXIT")
    (loop,) = warp_paths.main_loops(one)
    assert len(loop) == 7 and [i.base for i in warp_paths.iteration(loop, one)] == ["HMMA", "BRA", "IADD3", "BRA"]
    assert [i.base for i in warp_paths.entry_to_exit(one)] == ["MOV", "HMMA", "BRA", "IADD3", "BRA", "EXIT"]
    # of two ways with as many bytes, the one with the norm that an argument may turn off
    norm = code("@P1 BRA 0x20", "MUFU.RSQ R1, R2", "STG.E.128 [R2.64], R4", "EXIT")
    assert [i.base for i in warp_paths.entry_to_exit(norm)] == ["BRA", "MUFU", "STG", "EXIT"]


@pytest.mark.parametrize("gpu, registers, shared, warps, blocks", [
    ("h100", 255, 0, 8, (1, "registers")), ("h100", 128, 110 << 10, 8, (2, "registers")), ("h100", 64, 120 << 10, 4,
    (1, "shared memory")), ("a100", 32, 0, 4, (16, "registers")), ("l40s", 32, 0, 16, (3, "warps")),
    ("4090", 16, 0, 1, (24, "blocks")), ("l40s", 32, 128 << 10, 4, (0, "shared memory"))])
def test_blocks_of_an_sm(gpu, registers, shared, warps, blocks):
    assert blocks_per_sm(GPUS[gpu], registers, shared, warps) == blocks


def test_an_sm_has_the_shared_memory_of_a_block_and_what_the_system_takes():
    assert all(gpu.shared == SHARED[gpu.cc] + 1024 for gpu in GPUS.values())


# ------------------------------------------------------------------------------------------------------- simulation
def cycles(path, warps=4, blocks=1, gpu=H100, **more):
    return Simulation(path, gpu, warps, blocks, **more).run().cycles


def test_latency_is_hidden_by_other_warps():
    path = code("LDG.E R4, [R2.64] # sets 0", "FADD R5, R4, R5 # waits for 0")
    alone, together = cycles(path), cycles(path, blocks=8, stagger=30)
    assert H100.latency_l2 < alone < H100.latency_l2 + 40 and together < 1.2 * alone  # eight turns in the time of one


def test_a_copy_is_waited_for_unless_it_was_issued_a_turn_before():
    work = ["FADD R1, R1, R2"] * 200
    waits, runs = (cycles(code(*pipelined(left, *work)[1:-2], stall=2), gpu=A100) for left in (0, 1))
    assert waits - runs > A100.latency_l2 / 2 and runs < 460  # 208 instructions, two cycles each


def test_warpgroups_meet_at_a_named_barrier():
    """Two warpgroups, one wgmma each: without the barrier they take turns at the Tensor Core, with it both wait for it."""
    product = ["HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    softmax = ["MUFU.EX2 R1, R2"] * 16
    free = cycles(code(*product, *softmax), warps=8)
    met = cycles(code(*product, *softmax, "BAR.SYNC.DEFER_BLOCKING 0x9, 0x100"), warps=8)
    assert free == pytest.approx(256, abs=10) and met > 1.3 * free  # 2 x 128 on either unit, all overlapped
    ordered = cycles(code("BAR.SYNC.DEFER_BLOCKING R9, 0x100", *product[:1], "BAR.ARV R9, 0x100", *product[1:], *softmax),
                     warps=8)
    assert ordered < met  # each warpgroup lets the other one go before it waits
    with pytest.raises(ValueError, match="one role of several"):
        cycles(code("BAR.SYNC.DEFER_BLOCKING 0x9, 0x200"), warps=8)


def test_a_warp_that_adds_to_global_memory_takes_its_time():
    path = code("BAR.SYNC.DEFER_BLOCKING R3, 0xa0", *["STS.128 [R2], R4"] * 64, "BAR.ARV R3, 0xa0")
    assert units.reduced_bytes(path) == 64 * 512
    expected = 64 * 512 / H100.red / (H100.l2_port / 4) + H100.latency_l2
    assert cycles(path) == pytest.approx(expected, rel=0.3) and cycles(path[1:-1]) < expected / 4


# ------------------------------------------------------------------------------------------------------------ facts
def test_facts_of_a_loop():
    read = lambda *lines, blocks=2: facts.read(code(*lines), blocks, "registers", 8)
    good = read(*pipelined(1))
    assert good.prefetch == pytest.approx(8 / 7, abs=0.2) and good.faults() == []
    assert read(*pipelined(0)).faults() == ["prefetch"] and read(*pipelined(2)).prefetch > 2
    divided = read(*pipelined(1, "I2F.U32.RP R1, R2", "MUFU.RCP R1, R1", "F2I.FTZ.U32.TRUNC.NTZ R1, R1"))
    assert (divided.divisions, divided.faults()) == (1, ["division"])
    assert read(*pipelined(1, "CALL.REL.NOINC 0x1000")).faults() == ["division"]
    spilled = read(*pipelined(1, "LDL R4, [R1]"))
    assert (spilled.local, spilled.faults()) == (1, ["local memory"])
    assert facts.read(code(*pipelined(1)), 1, "shared memory", 4).faults() == ["occupancy"]
    # TMA: the stages are the launcher's to know
    loop = ["SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
            "UTMALDG.2D [UR8], [UR6]", "@P1 BRA 0x0", "EXIT"]
    assert [facts.read(code(*loop), 1, "", 8, stages).prefetch for stages in (None, 2, 4)] == [None, 0.5, 2.5]


def test_a_prediction_says_how_far_the_model_was_off():
    kernel = Kernel("example", listing(*pipelined(1, "MUFU.EX2 R1, R2", "FMNMX R3, R1, R2, !PT")), 128, 0, 4)
    found = predict(kernel, A100)
    assert found.facts.blocks == 4 and found.tflops <= found.bound_tflops and found.error.endswith("forwards on sm_80")
    assert json.loads(json.dumps(found.to_dict()))["predicted"] is True
    assert predict(dataclasses.replace(kernel, useful=0.5), A100).tflops == pytest.approx(found.tflops / 2)
    # prologue and epilogue: 64 stores of 16 bytes a thread, and the way between blocks
    long = dataclasses.replace(kernel, turns=8, sass=listing(*pipelined(1, "MUFU.EX2 R1, R2")[:-1],
                                                             *["STG.E.128 [R2], R8"] * 64, "EXIT"))
    whole, loop = predict(long, A100), predict(dataclasses.replace(long, turns=None), A100)
    assert loop.outside is None and loop.tflops == loop.loop_tflops == whole.loop_tflops
    assert whole.outside > 64 * 16 * 32 / (A100.l2_port / 4) and whole.outside > found.cycles
    assert whole.tflops == pytest.approx(loop.tflops * 8 * loop.cycles / (8 * loop.cycles + whole.outside))
    with pytest.raises(ValueError, match="no room for its shared memory"):
        predict(dataclasses.replace(kernel, shared=200 << 10), A100)
    copy = ["LDG.E.128 R4, [R2.64]", "STG.E.128 [R2.64], R4", "EXIT"]
    copied = predict(Kernel("copy", listing(*copy), 32, 0, 4, traffic=2.0), A100)
    assert 0.5 < copied.copy_share <= 1 and copied.issue_over_dram < 0.1 and copied.error.startswith("not calibrated")


def test_calibration_rows_are_whole():
    rows = calibration.rows()
    unfitted = [row for row in rows if row["kind"] == "forward" and not row["fitted"] and abs(row["error"]) <= 0.10]
    assert len(unfitted) >= 4 and {row["cc"] for row in rows} == {80, 90}
    for row in rows:
        assert row["error"] == pytest.approx(row["predicted"] / row["published"] - 1, abs=1e-3) and row["source"]
        assert len(row.get("sha256", "")) == 64 or row["compiled with"].startswith("Triton ")
    assert all(abs(row["error"]) <= 0.15 for row in rows if row["kind"] == "backward")
    errors = [row["error"] for row in rows]
    told = f"{-min(errors):.0%} too slow to {max(errors):.0%} too fast"
    assert told in (Path(__file__).parents[1] / "docs/guide/predict.md").read_text(encoding="utf-8")
