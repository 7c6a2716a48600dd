"""Cohorts: records of finished cases, runs that go on after a kill, lists of volumes, and workers."""

import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_monai_bundle_here
from distributed import LocalCluster
from filelock import FileLock
from runs_that_die import Deadly, WithoutModel

from autosam import cohort, workers
from autosam.__main__ import main
from autosam.cohort import RECORDS, Case
from autosam.workers import Job, LocalWorkers
from components.data.volume_list import read_volume_list
from components.phantom.dataset import write_phantom_dataset

FAST = ("--bundle", "unet_acdc", "--test_time_views", "1", "--overlays", "False")
FRAMES = (0, 4, 8)  # of a phantom's cine


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def cines(tmp_path_factory):
    """A function that writes cines of 4 slices and 3 frames, each with another noise."""
    root = tmp_path_factory.mktemp("phantom")
    write_phantom_dataset(str(root), patients=1, size_hw_d=(48, 40, 4), series=True)
    source = nib.load(next(root.rglob("*_4d.nii.gz")))
    voxels = np.asarray(source.dataobj)[..., FRAMES]

    def write(folder: Path, count: int) -> Path:
        folder.mkdir()
        for number in range(count):
            noisy = voxels + np.random.default_rng(number).normal(0, voxels.std() / 20, voxels.shape)
            nib.save(nib.Nifti1Image(noisy.astype(np.float32), source.affine), folder / f"cine{number:02d}.nii.gz")
        return folder

    return write


@pytest.fixture(scope="module")
def volumes(cines, tmp_path_factory):
    """Three volumes: the first frames of cines."""
    folder = cines(tmp_path_factory.mktemp("volumes") / "in", 3)
    for path in folder.iterdir():
        nib.save(nib.load(path).slicer[..., 0], path)
    return folder


@pytest.fixture
def segment(capsys, one_thread):  # noqa: ARG001
    """Run `autosam segment` in this process; return the line on what it did, and its error."""

    def run(image, output, *further) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["segment", str(image), "-o", str(output), *FAST, *map(str, further)])
        run.shown = capsys.readouterr()
        done = re.search("^segmented .*(?= \\()", run.shown.out, flags=re.MULTILINE)
        return done[0] if done else "", str(ended.value.code or "")

    return run


def record_of(output: Path, case: str) -> dict:
    return json.loads((output / RECORDS / f"{case}.json").read_text())


def records_of(output: Path) -> list[Path]:
    """The files of finished records, without the hidden one of a record that is being written."""
    return list((output / RECORDS).glob("[!.]*.json"))


def results_of(output: Path) -> dict[str, bytes]:
    """The files that a run has written, without its log and the seconds in its records."""
    found = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    without = {name: re.sub(rb'"seconds": .*', b"", content) for name, content in found.items()}
    return {name: content for name, content in without.items() if not name.endswith((".log", ".lock"))}


def test_what_is_done_is_done_again_only_if_image_model_settings_or_output_changed(volumes, segment, tmp_path):
    data, out = shutil.copytree(volumes, tmp_path / "in"), tmp_path / "out"
    assert segment(data, out) == ("segmented 3 images with unet_acdc", "")
    assert segment(data, out) == ("segmented 0 images with unet_acdc; 3 done before", "")
    (out / "cine00_pred.nii.gz").unlink()
    shutil.copy(data / "cine02.nii.gz", data / "cine01.nii.gz")
    before = record_of(out, "cine01")["image"]
    assert segment(data, out)[0] == "segmented 2 images with unet_acdc; 1 done before"
    assert (out / "cine00_pred.nii.gz").is_file()
    assert before != record_of(out, "cine01")["image"] == record_of(out, "cine02")["image"]
    assert segment(data, out, "--batch_size", 2)[0].endswith("3 done before")  # it does not change the labels
    assert segment(data, out, "--slice_smoothing", 0)[0] == "segmented 3 images with unet_acdc"
    assert record_of(out, "cine00")["settings"]["slice_smoothing"] == 0
    model = torch.load(REPOSITORY / "components/pretrained/unet.pt", weights_only=True)
    torch.save({key: value * 1.01 if value.is_floating_point() else value for key, value in model.items()}, "m.pt")
    again = segment(data, out, "--slice_smoothing", 0, "--ckpt_path", "m.pt")
    assert again == ("segmented 3 images with unet_acdc", "")


def test_a_case_that_fails_is_recorded_with_its_reason_and_tried_again(volumes, segment, tmp_path):
    data, out = shutil.copytree(volumes, tmp_path / "in"), tmp_path / "out"
    whole = (data / "cine01.nii.gz").read_bytes()
    (data / "cine01.nii.gz").write_bytes(whole[:2000])
    done, error = segment(data, out)
    assert done == "segmented 2 images with unet_acdc"
    assert re.match("error: 1 of 3 volumes failed: .*cine01.nii.gz cannot be read", error)
    assert "cannot be read" in record_of(out, "cine01")["failed"][str(data / "cine01.nii.gz")]
    assert segment(data, out) == ("segmented 0 images with unet_acdc; 2 done before", error)
    (data / "cine01.nii.gz").write_bytes(whole)
    assert segment(data, out) == ("segmented 1 image with unet_acdc; 2 done before", "")


@pytest.mark.slow
def test_the_frames_of_a_patient_are_one_case_as_in_one_run_of_monai(tmp_path, segment):
    write_phantom_dataset(str(tmp_path / "in"), patients=2, size_hw_d=(48, 40, 2))
    assert segment(tmp_path / "in", tmp_path / "out", "--measure")[0].startswith("segmented 4 images")
    command = shlex.split(next(line for line in segment.shown.out.splitlines() if line.startswith("$ ")))
    run_monai_bundle_here(*(word if word != str(tmp_path / "out") else "monai" for word in command[4:]), cwd=tmp_path)
    ours, monais = results_of(tmp_path / "out"), results_of(tmp_path / "monai")
    records = ours.keys() - monais.keys()
    assert len(records) == 2
    assert all(re.fullmatch(r"records/patient00[12]_frame\d\d.json", name) for name in records)
    assert {name: content for name, content in ours.items() if name not in records} == monais
    info = next((tmp_path / "in").rglob("patient002/Info.cfg"))
    info.write_text(info.read_text().replace("Height: ", "Height: 1"))
    assert segment(tmp_path / "in", tmp_path / "out", "--measure")[0].startswith(
        "segmented 2 images with unet_acdc; 2 done before"
    )


def test_ids_of_a_list_name_the_results(volumes, segment, tmp_path):
    list_file = tmp_path / "lists" / "heart.csv"
    list_file.parent.mkdir()
    rows = [f"b,{volumes}/cine00.nii.gz,x", f"A 1,{os.path.relpath(volumes, list_file.parent)}/cine01.nii.gz,"]
    list_file.write_text("\n".join(["id,path,note", *rows, "gone,missing.nii.gz,"]) + "\n")
    done, error = segment(list_file, tmp_path / "out", "--measure")
    assert done == "segmented 2 images with unet_acdc"
    assert error.startswith("error: 1 of 3 volumes failed: there is no image ")
    assert [line.split(",")[0] for line in (tmp_path / "out/function.csv").read_text().splitlines()] == [
        "case",
        "A 1",
        "b",
    ]
    assert {path.name for path in (tmp_path / "out").glob("*_pred.nii.gz")} == {"b_pred.nii.gz", "A 1_pred.nii.gz"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,path\na,x.nii\nb,y.nii\na,z.nii\n", r"line 2 \(a\) and line 4 \(a\) have one id"),
        ("id,path\na,x.nii\nA,y.nii\n", r"line 2 \(a\) and line 3 \(A\) have one id"),
        ("id,path\n\u00e9,x.nii\ne\u0301,y.nii\n", r"line 2 \(.*\) and line 3 \(.*\) have one id"),
        ("id,path\na,x.nii\nb,./x.nii\n", r"line 2 \(a\) and line 3 \(b\) have one path"),
        ("id,path\na/b,x.nii\n", "an id of letters"),
        ("id,path\n.a,x.nii\n", "an id of letters"),
        ("id,path\nfunction,x.nii\n", "not function"),
        ("id,path\na\n", "expected a path"),
        ("name,path\na,x.nii\n", "has no column id: expected id,path, found name, path"),
        ("id,path\n", "lists no volume"),
        ("", "has no column id or path"),
    ],
)
def test_a_wrong_list_is_refused_with_the_rows_at_fault(text, said, tmp_path):
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        read_volume_list(tmp_path / "list.csv")


def test_a_second_run_into_the_same_folder_is_refused_while_the_first_is_running(
    volumes, segment, tmp_path, monkeypatch
):
    monkeypatch.setattr(cohort, "_LOCK_S", 0.1)
    (tmp_path / "out" / RECORDS).mkdir(parents=True)
    with FileLock(tmp_path / "out" / RECORDS / ".lock"):
        assert segment(volumes, tmp_path / "out")[1].startswith("error: another run writes to")


def killed_at_random_moments(data: Path, output: Path, kills: int, *further: str) -> int:
    """Kill runs soon after each has finished a case; return how many cases were done by then."""
    context, chosen = multiprocessing.get_context("forkserver"), random.Random(0)
    loaded = [name for name in sys.modules if name.startswith(("components.", "autosam.cohort", "monai.bundle"))]
    context.set_forkserver_preload(loaded)  # what a run imports, so that it starts at once
    arguments = ["segment", str(data), "-o", str(output), *FAST, "--measure", *further]
    for _ in range(kills):
        before = len(records_of(output))
        process = context.Process(target=main, args=(arguments,))
        process.start()
        while process.is_alive() and len(records_of(output)) == before:
            time.sleep(0.02)
        process.join(timeout=chosen.uniform(0, 0.5))  # less than a case takes
        assert process.is_alive(), "the run has ended before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return len(records_of(output))


def test_nothing_is_lost_or_doubled_by_kills(cines, segment, tmp_path):
    data = cines(tmp_path / "in", 6)
    segment(data, tmp_path / "whole", "--measure")
    done = killed_at_random_moments(data, tmp_path / "killed", 3)
    assert 3 <= done < 6
    assert not (tmp_path / "killed/function.csv").exists()
    times = {path: path.stat().st_mtime_ns for path in records_of(tmp_path / "killed")}
    line, _ = segment(data, tmp_path / "killed", "--measure")
    assert line == f"segmented {6 - done} images with unet_acdc; {done} done before"
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert results_of(tmp_path / "killed") == results_of(tmp_path / "whole")
    assert len((tmp_path / "whole/function.csv").read_text().splitlines()) == 1 + 6


@pytest.mark.slow
def test_sixty_cines_on_two_workers_survive_twenty_kills(cines, segment, tmp_path):
    data = cines(tmp_path / "in", 60)
    done = killed_at_random_moments(data, tmp_path / "killed", 20, "--workers", "2")
    line, _ = segment(data, tmp_path / "killed", "--measure", "--workers", 2)
    assert line == f"segmented {60 - done} images with unet_acdc; {done} done before"
    segment(data, tmp_path / "whole", "--measure")
    assert results_of(tmp_path / "killed") == results_of(tmp_path / "whole")


@pytest.mark.slow
def test_two_workers_give_the_results_of_one_process(cines, segment, tmp_path):
    data = cines(tmp_path / "in", 2)
    (data / "cine03.nii.gz").write_bytes(b"hello")
    for output, *further in (("one",), ("two", "--workers", 2)):
        done, error = segment(data, tmp_path / output, "--measure", *further)
        assert done == "segmented 2 images with unet_acdc"
        assert re.match("error: 1 of 3 volumes failed: .*cine03.nii.gz is not a NIfTI file", error)
    assert "3 cases, 2 workers of one thread" in segment.shown.err
    assert re.search(r"a worker has taken (\d+) MB: 2 take \d+ MB", segment.shown.err)
    assert results_of(tmp_path / "one") == results_of(tmp_path / "two")


def run_workers(run, names):
    """The record of each case, or what the run's worker gives instead."""
    cases = [Case(name, [{"image": f"{name}.nii"}]) for name in names]
    return {case.name: record for case, record, _ in LocalWorkers(Job(run, Path("log")), 2)(cases)}


def test_a_worker_that_dies_is_replaced_and_its_case_tried_once_more():
    records = run_workers(Deadly(), ("once", "deadly", "a", "b", "c"))
    reason = records.pop("deadly").failed["deadly.nii"]
    assert reason.startswith("its process ended 2 times, at last with signal SIGKILL")
    assert {name: text.split()[0] for name, text in records.items()} == {name: name for name in ("once", "a", "b", "c")}
    pids = {text.split()[-1] for text in records.values()}
    deadline = time.monotonic() + 10
    while any(Path("/proc", pid).exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path("/proc", pid).exists() for pid in pids)


def test_workers_that_cannot_start_say_why():
    with pytest.raises(RuntimeError, match="there is no model"):
        run_workers(WithoutModel(), ("a", "b"))


def test_each_worker_has_a_device_of_its_own_while_there_are_enough(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    workers = LocalWorkers(Job(Deadly(), Path("log")), 3)
    monkeypatch.setattr(Deadly, "options", {})
    assert [workers._environment(place)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["3", "5", "3"]
    with pytest.raises(ValueError, match="expected --workers to be 1 or more, received 0"):
        LocalWorkers(Job(Deadly(), Path("log")), 0)


def test_more_workers_than_memory_are_refused_before_they_start(monkeypatch, tmp_path, capsys):
    memory = tmp_path / "meminfo"
    monkeypatch.setattr(workers, "_MEMORY", memory)
    memory.write_text("MemTotal: 99999999 kB\nMemAvailable: 819199 kB\n")
    with pytest.raises(ValueError, match=r"2 workers need at least 800 MB .* 799 MB are .* be at most 1$"):
        run_workers(Deadly(), ("a", "b"))
    assert not capsys.readouterr().err
    memory.write_text("MemTotal: 1 kB\nMemAvailable: 819200 kB\n")
    assert run_workers(Deadly(), ("a", "b")).keys() == {"a", "b"}
    assert "2 cases, 2 workers of one thread, which take at least 800 MB" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dask_cluster_gives_the_results_of_one_process(volumes, segment, tmp_path):
    segment(volumes, tmp_path / "one", "--measure")
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        done, error = segment(volumes, "dask", "--measure", "--scheduler", cluster.scheduler_address)
    assert (done, error) == ("segmented 3 images with unet_acdc", "")
    assert results_of(tmp_path / "one") == results_of(tmp_path / "dask")
