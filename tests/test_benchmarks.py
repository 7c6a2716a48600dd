import csv
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from benchmarks import cohort_section
from benchmarks.__main__ import main
from benchmarks.bundle import HEADS
from benchmarks.contenders import hugging_face_name
from benchmarks.flops import encoder_flops
from benchmarks.memory import CLEAR_REFS, MIB, peak_mib
from benchmarks.report import Row, Table, to_markdown, write_report
from benchmarks.settings import SECTIONS, Settings
from benchmarks.timing import Contender, Ratio, measure, ratio_of
from benchmarks.training_costs import Costs, Plan, cached_seconds, every_step_seconds, head_seconds
from components.networks.onnx_network import ENGINES
from components.sam.image_encoder import Architecture

# Two labelled slices in six epochs of one step, two views; four validation slices (two batches) after epochs 3 and 6.
PLAN = Plan(slices=2, validation_slices=4, epochs=6, batch_size=2, val_interval=3, views=2)
# Each part fills two decimal digits of the sum.
COSTS = Costs(augment=1, encode=100, hit=1_00_00, step=1_00_00_00, forward=1_00_00_00_00)


def test_encoding_every_step_pays_for_every_slice_shown():
    # 2 * 6 slices are augmented; these and 2 * 4 validation slices are encoded; 6 steps and 2 * 2 validation batches.
    assert every_step_seconds(PLAN, COSTS) == 4_06_00_20_12


def test_a_cached_training_pays_once_for_every_view_and_validation_slice():
    # 2 * 2 views are augmented; these and 4 validation slices are encoded; 8 views and 4 slices are cache hits.
    assert cached_seconds(PLAN, COSTS) == 4_06_12_08_04


def test_a_training_shorter_than_its_views_looks_nothing_up():
    short = Plan(slices=2, validation_slices=4, epochs=1, batch_size=2, val_interval=3, views=16)
    assert cached_seconds(short, COSTS) == every_step_seconds(short, COSTS) == 1_00_02_02


def test_a_heads_own_work_is_the_same_with_and_without_a_cache():
    free = Costs(augment=0, encode=0, hit=0, step=3, forward=5)
    assert head_seconds(PLAN, free) == cached_seconds(PLAN, free) == every_step_seconds(PLAN, free) == 6 * 3 + 4 * 5


def one_block(global_attn_indexes: tuple[int, ...]) -> Architecture:
    return Architecture(embed_dim=2, depth=1, num_heads=1, global_attn_indexes=global_attn_indexes, native_size=32)


def test_flops_of_one_global_block_on_four_tokens():
    patches = 2 * 4 * 768 * 2
    linear = 24 * 4 * 2**2
    attention = 4 * 2 * (4 * 4) + 2 * 2 * 4 * (2 + 2)
    neck = 2 * 4 * (256 * 2 + 9 * 256 * 256)
    assert encoder_flops(one_block((0,)), 32) == patches + linear + attention + neck


def test_padding_of_windows_costs_nothing():
    # A grid of 15 x 15 falls into windows of 14 x 14, 14 x 1, 1 x 14 and 1 x 1.
    pairs = 196**2 + 14**2 + 14**2 + 1
    positions = 196 * 28 + 14 * 15 + 14 * 15 + 2
    saved = 4 * 2 * (225**2 - pairs) + 2 * 2 * (225 * 30 - positions)
    assert encoder_flops(one_block((0,)), 240) - encoder_flops(one_block(()), 240) == saved


def test_contenders_take_turns_after_one_warm_up_each():
    calls: list[str] = []
    contenders = {
        "a": Contender(partial(calls.append, "a")),
        "b": Contender(partial(calls.append, "b"), warm_up=partial(calls.append, "short b")),
    }
    times = measure(contenders, rounds=3)
    assert calls == ["a", "short b", "a", "b", "a", "b", "a", "b"]
    assert [len(seconds) for seconds in times.values()] == [3, 3]


def test_the_device_is_waited_for_before_and_after_every_turn():
    calls: list[str] = []
    measure({"a": Contender(partial(calls.append, "a"))}, rounds=1, synchronize=partial(calls.append, "wait"))
    assert calls == ["wait", "a", "wait", "wait", "a", "wait"]


def test_a_ratio_compares_within_rounds():
    # The machine was ten times slower in the second round, for both.
    assert ratio_of([2, 30, 1], [1, 10, 2]) == Ratio(median=2, low=0.5, high=3)


def test_a_table_shows_ratios_to_its_baseline():
    table = Table("encoder", "theirs", "What was measured.", "a batch")
    table.add("64 px", {"theirs": [2.0, 20.0, 2.0], "ours": [1.0, 10.0, 1.5]}, {"ours": {"error": 0.25}})
    table.rows.append(Row("all", "another: not installed", None, None))
    text = to_markdown([table], host="a machine", title="One run.")
    assert "- encoder, 64 px: ours / theirs = 0.5 (0.5 to 0.75)" in text
    assert [cell.strip() for cell in text.splitlines()[-2].split("|")[1:-1]] == [
        "64 px", "ours", "0.5 (0.5 to 0.75)", "0.25", "1.5",
    ]  # fmt: skip
    assert "another: not installed" in text.splitlines()[-1]


def test_the_summary_holds_only_ratios(tmp_path):
    table = Table("encoder", "theirs", "What was measured.", "a batch")
    table.add("64 px", {"theirs": [123.0], "ours": [246.0]})
    text = write_report([table], host="a machine", title="One run.", output_dir=tmp_path)
    summary = text.split("## Summary")[1].split("##")[0]
    assert summary.strip() == "- encoder, 64 px: ours / theirs = 2"
    (_, ours) = csv.DictReader((tmp_path / "benchmarks.csv").read_text().splitlines())
    assert (ours["ratio"], ours["seconds"], ours["baseline"]) == ("2.0", "246.0", "theirs")


def test_names_of_weights_in_transformers():
    assert hugging_face_name("blocks.3.norm1.weight") == "layers.3.layer_norm1.weight"
    assert hugging_face_name("blocks.3.attn.rel_pos_h") == "layers.3.attn.rel_pos_h"
    assert hugging_face_name("neck.1.bias") == "neck.layer_norm1.bias"
    assert hugging_face_name("patch_embed.proj.weight") == "patch_embed.projection.weight"


def keep_and_fill(mebibytes: int):
    """Allocate 200 MiB, like a network, and return work that allocates more."""
    built = torch.ones(200 * MIB // 4)
    return lambda: torch.ones(mebibytes * MIB // 4).sum() + built[0]


@pytest.mark.skipif(torch.cuda.is_available() or not CLEAR_REFS.exists(), reason="needs /proc, and no GPU")
def test_peak_memory_is_that_of_the_work_only():
    here = torch.ones(400 * MIB // 4)  # this process's own memory does not count
    assert math.isclose(peak_mib(partial(keep_and_fill, 100)), 100, abs_tol=20)
    assert float(here[0]) == 1


BUSY = f"import time; kept = b'1' * {300 * MIB}; any(iter(lambda: time.process_time() >= 1.05, True)); time.sleep(1)"
STANDS_FOR_AUTOSAM = f"""
import json, pathlib, subprocess, sys, time
output = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
(output / "records").mkdir()
for case, seconds in enumerate((2, 4)):
    (output / f"records/{{case}}.json").write_text(json.dumps({{"seconds": seconds}}))
if sys.argv[-1] == "2":  # a child with memory of its own
    subprocess.run([sys.executable, "-c", "{BUSY}"])
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Replace `autosam` by a script whose two cases take 2 and 4 seconds, with a child of 300 MiB for two workers."""
    script = tmp_path / "stands_for_autosam.py"
    script.write_text(STANDS_FOR_AUTOSAM)
    monkeypatch.setattr(cohort_section, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(cohort_section, "_POLL_S", 0.1)


@pytest.mark.usefixtures("stand_in", "one_thread")
def test_a_cohorts_costs_are_those_of_its_records_and_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    table = Table("cohort", cohort_section.BASELINE, "", "a case")
    cohort_section.compare(table, Settings(tmp_path, quick=True, rounds=1), "in", "a bundle")
    one, two = table.rows
    assert 2 < one.seconds < two.seconds < 6  # 4 s or more for 2 cases, then the child's second
    rate = 60 / two.seconds
    assert math.isclose(two.extra["cases a minute"], rate)
    assert math.isclose(two.extra["a minute and core"], rate / 2)
    assert -4 < two.extra["start-up s"] < 0  # the record says that it began before the command
    if Path("/proc/self/smaps_rollup").exists():
        assert 300 < float(two.extra["peak MiB"]) < 400
        assert 0.5 < two.extra["core s"] < 1  # the child's second, for two cases
        assert math.isclose(two.extra["a minute and GiB"], rate * 1024 / float(two.extra["peak MiB"]), rel_tol=0.01)


@pytest.mark.usefixtures("one_thread")
def test_a_cohort_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(cohort_section, "COMMAND", (sys.executable, "-c", "raise SystemExit('no such bundle')"))
    with pytest.raises(RuntimeError, match="autosam segment has failed: no such bundle"):
        cohort_section.run(Settings(tmp_path, quick=True))


@pytest.mark.usefixtures("one_thread", "stand_in")
def test_a_quick_run_writes_table_csv_and_plot(tmp_path, monkeypatch, capsys):
    options = ["--quick", "--threads", "1", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks", *options])
    monkeypatch.setattr("benchmarks.epoch_section.HEADS", {"LinearHead": HEADS["LinearHead"]})
    monkeypatch.setattr("benchmarks.engine_section.shutil.which", lambda _: None)  # compiling takes a minute
    monkeypatch.delitem(ENGINES, "openvino")  # a fault of its C++ code would end this process
    main()
    check_report(tmp_path, capsys.readouterr().out)


@pytest.mark.slow
def test_a_quick_run_of_the_command_trains_every_head(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--threads", "1", "--output_dir", str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = check_report(tmp_path, result.stdout)
    assert {row["case"].rpartition(", ")[0] for row in rows if row["section"] == "epoch"} == HEADS.keys()


def check_report(folder: Path, printed: str) -> list[dict[str, str]]:
    """Check what a quick run has written and printed; return the rows of its table."""
    assert (folder / "benchmarks.md").read_text() in printed
    with (folder / "benchmarks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["section"] for row in rows} == set(SECTIONS)
    for section in SECTIONS:
        assert any(row["contender"].startswith("ours") for row in rows if row["section"] == section)
    assert all(float(row["ratio"]) > 0 for row in rows if row["ratio"])
    errors = {row["contender"]: float(row["error"]) for row in rows if row["error"]}
    assert 0 < errors["segment_anything"] < 1e-4
    assert errors["ours"] == 0
    assert (folder / "benchmarks.png").read_bytes().startswith(b"\x89PNG")
    return rows
