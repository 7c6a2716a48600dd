"""The command `autosam` and the same from Python: what they run, write, say and refuse."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from monai.transforms import LoadImage
from PIL import Image
from test_custom_data import plain

import autosam
from autosam.__main__ import app, main
from autosam.folders import SHIPPED, find_bundle, own_copy, shipped_bundles
from autosam.record import RECORD, typed_knobs
from autosam.runner import LOG
from components.phantom.dataset import write_phantom_dataset
from components.training.command_line import refuse_unknown_knobs

COMMANDS = [command.callback.__name__ for command in app.registered_commands]
SHORT = ("--steps", "2", "--batch_size", "2", "--phantom_share", "0", "--test_time_views", "1")
SCREEN = (80, 40)  # columns, lines


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("phantoms")
    write_phantom_dataset(str(root), patients=10, size_hw_d=[64, 56, 3])
    return root


@pytest.fixture(scope="module")
def volume(phantoms) -> Path:
    return sorted(phantoms.rglob("*frame??.nii.gz"))[0]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working directory that knows nothing of the project."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def autosam_says(capsys, elsewhere):  # noqa: ARG001 - the working directory
    """Run the command in this process; return its lines."""

    def run(*arguments, status=0) -> list[str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        run.shown = said.err
        assert (ended.value.code or 0) == status or isinstance(ended.value.code, str), said
        return (said.out + (ended.value.code if isinstance(ended.value.code, str) else "")).splitlines()

    return run


def refusal(autosam_says, *arguments) -> str:
    line = autosam_says(*arguments)[-1]
    assert line.startswith("error: "), line
    return line.removeprefix("error: ")


def files_of(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*") if "__pycache__" not in path.parts}


def values(nifti: Path) -> np.ndarray:
    return np.asarray(nib.load(nifti).dataobj)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_a_screen_and_has_an_example_that_is_understood(command, autosam_says, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(SCREEN[0]))
    lines = autosam_says(*filter(None, [command]), "--help")
    assert len(lines) <= SCREEN[1]
    assert max(map(len, lines)) <= SCREEN[0]
    example = shlex.split(next(line for line in lines if "Example: " in line).split("Example: ")[1])
    assert example[0] == "autosam"
    assert example[1] == (command or "segment")


def test_help_needs_no_torch():
    code = "import sys, autosam.__main__; print('torch' in sys.modules, 'monai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("further", [[], ["--measure"]])
def test_segmenting_gives_labels_a_picture_and_the_same_from_monai_and_from_python(
    further, autosam_says, volume, elsewhere
):
    before = files_of(SHIPPED)
    first, *last = autosam_says("segment", volume, "-o", "out", "--test_time_views", "2", *further)
    assert files_of(SHIPPED) == before  # nothing is written to where the package lies
    assert len(last) <= 5
    assert re.match(r"segmented 1 image with linearhead_acdc \(\d+ s\)", last[0])
    labels = elsewhere / f"out/{volume.name.removesuffix('.nii.gz')}_pred.nii.gz"
    picture = elsewhere / f"out/{volume.name.removesuffix('.nii.gz')}_overlay.png"
    shown = elsewhere / "out/function.html" if further else picture
    assert str(shown.relative_to(elsewhere)) in "".join(last)
    assert np.ptp(np.asarray(Image.open(picture).convert("RGB")), axis=-1).max() > 50  # coloured
    assert "Restored all variables" in (elsewhere / "out" / LOG).read_text()

    python = autosam.segment(volume, test_time_views=2)
    assert python.dtype == torch.uint8
    assert np.array_equal(python[0].numpy(), values(labels))
    assert np.allclose(python.affine, nib.load(volume).affine)

    command = shlex.split(first.removeprefix("$ ").replace("-o out", "-o monai"))
    command[0] = sys.executable
    command[command.index("--output_dir") + 1] = "monai"
    if not further:  # one run by MONAI's own runner is enough
        subprocess.run(command, check=True, capture_output=True, env={"PYTHONPATH": str(REPOSITORY)})
        assert np.array_equal(values(elsewhere / "monai" / labels.name), values(labels))


def test_python_takes_paths_arrays_and_metatensors_and_keeps_the_network(volume, elsewhere):
    segmenter = autosam.load("unet_acdc", test_time_views=1)
    network = segmenter._network
    of_path = segmenter(volume)
    image = nib.load(volume)
    assert torch.equal(segmenter(image.get_fdata(), affine=image.affine), of_path)
    for loaded in (LoadImage()(volume), LoadImage(ensure_channel_first=True)(volume)):
        assert torch.equal(segmenter(loaded), of_path)
    assert segmenter._network is network
    assert list(elsewhere.iterdir()) == []
    with pytest.raises(ValueError, match="give affine="):
        segmenter(image.get_fdata())


def test_python_segments_and_measures_a_cine_as_the_command_does(autosam_says, phantoms, elsewhere):
    frames = [nib.load(path) for path in sorted(phantoms.rglob("patient001_frame??.nii.gz"))]
    cine = np.stack([frame.get_fdata() for frame in frames], axis=-1)
    nib.save(nib.Nifti1Image(cine, frames[0].affine), elsewhere / "cine.nii.gz")
    autosam_says("segment", "cine.nii.gz", "--bundle", "unet_acdc", "--measure", "--test_time_views", "1")
    segmenter = autosam.load("unet_acdc", test_time_views=1)
    labels = segmenter(cine, affine=frames[0].affine)
    assert labels.shape == (1, *cine.shape)
    assert np.array_equal(labels[0].numpy(), values(Path("segmented/cine_pred.nii.gz")))
    measures = segmenter.measure("cine.nii.gz")
    with Path("segmented/function.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert measures.keys() == row.keys()
    assert measures["lv_edv_ml"] == float(row["lv_edv_ml"]) > 0
    assert (measures["case"], measures["reason"]) == (row["case"], row["reason"])
    assert [path.name for path in Path("segmented").glob("*.png")] == ["cine_overlay.png"]


def test_a_shipped_bundle_is_copied_trained_evaluated_and_segments_by_what_it_learned(
    autosam_says, phantoms, volume, elsewhere
):
    before = files_of(SHIPPED)
    *_, trained, _, _, following = autosam_says("train", "unet_acdc", "--data", phantoms, "--labelled", 1, *SHORT)
    assert re.match(r"trained unet_acdc: mean Dice 0\.\d{3} on the validation cases, 0\.\d{3} before", trained)
    model = elsewhere / "unet_acdc/models/model.pt"
    assert model.is_file()
    assert files_of(SHIPPED) == before
    record = json.loads((elsewhere / "unet_acdc" / RECORD).read_text())
    assert record["knobs"]["labelled_cases"] == "1"

    lines = autosam_says(*shlex.split(following.split("autosam ")[1]))  # its data are those of the training
    with (elsewhere / "unet_acdc/eval/summary.csv").open(newline="") as file:
        mean = {row["class"]: float(row["dice_mean"]) for row in csv.DictReader(file)}["mean"]
    assert f"mean Dice {mean:.3f}" in "\n".join(lines[-5:])
    assert len(list((elsewhere / "unet_acdc/eval").glob("*_overlay.png"))) == 4  # of two test patients

    autosam_says("segment", volume, "--bundle", "unet_acdc")  # the copy in the working directory, not the package's
    assert "Restored all variables from unet_acdc/models/model.pt" in (elsewhere / "segmented" / LOG).read_text()


def test_own_data_becomes_a_bundle_in_three_commands(autosam_says, tmp_path):
    plain(tmp_path / "data", mode="L")
    *_, following = autosam_says("new", "organ", tmp_path / "data")
    command = shlex.split(following.partition("autosam ")[2])
    lines = autosam_says(*command[:-1], "1", "--steps", "2", "--train#dataset#at_least", "1")
    assert "labelled_cases 1" in lines[0]
    lines = autosam_says("evaluate", "organ")
    assert "mean Dice" in lines[-4]
    image = next((tmp_path / "data/images").iterdir())
    autosam_says("segment", image, "--bundle", "organ", "-o", "out")
    (labels,) = Path("out").glob("*_pred.png")
    python = autosam.segment(image, bundle="organ")
    assert np.array_equal(python[0, ..., 0].numpy().T, np.asarray(Image.open(labels)))
    assert torch.equal(autosam.segment(np.asarray(Image.open(image)), bundle="organ"), python)


def test_dry_run_prints_a_command_that_monai_takes_and_does_nothing(autosam_says, phantoms, volume, elsewhere):
    for arguments in (
        ("segment", volume, "--batch_size", 3),
        ("segment", volume, "--measure", "--bundle", "unet_acdc"),
        ("train", "linearhead_acdc", "--data", phantoms, "--overlay", "neck", "--labelled", 5),
        ("evaluate", "cnnhead_acdc", "--data", phantoms),
        ("evaluate", "unet_acdc", "--data", phantoms),
    ):
        (line,) = autosam_says(*arguments, "--dry_run")
        words = shlex.split(line.removeprefix("$ "))
        assert words[:3] == ["python", "-m", "monai.bundle"]
        refuse_unknown_knobs(words[2:])
    assert list(elsewhere.iterdir()) == []


def test_what_cannot_be_done_is_one_line_that_says_what_to_do(autosam_says, phantoms, volume, elsewhere):
    (elsewhere / "no_bundle").mkdir()
    for arguments, said in {
        ("segment", "missing.nii.gz"): "there is no missing.nii.gz",
        ("segment", volume, "--bundle", "linearhed_acdc"): "did you mean linearhead_acdc?",
        ("segment", volume, "--bundle", "no_bundle"): "no_bundle is no bundle",
        ("segment", volume, "--bundle", "general_encoder"): "has no configs/inference.json",
        ("segment", volume, "--batch_sise", "3"): "Did you mean '--batch_size'?",
        ("segment", volume, volume): "unexpected",
        ("train", "unet_acdc"): "give --data FOLDER",
        ("train", "unet_acdc", "--data", "missing"): "there is no folder missing",
        ("train", "unet_acdc", "--data", phantoms, "--overlay", "nekc"): "has no configs/nekc.json",
        ("evaluate", "phantom_encoder"): "has no configs/evaluate.json",
        ("new", "a b", phantoms): "expected a name of letters",
        ("pack", "general_encoder"): "has no configs/inference.json",
        ("study", "missing.json"): "missing.json",
    }.items():
        assert said in refusal(autosam_says, *arguments), arguments
    assert not (elsewhere / "unet_acdc").exists()


@pytest.mark.parametrize("name", ["20230712", "run#1", "1e5", "$x", "with space"])
def test_names_stay_as_they_are_typed(name, autosam_says, volume, elsewhere):
    shutil.copytree(volume.parent, elsewhere / name)
    autosam_says("segment", name, "-o", f"{name}_out", "--bundle", "unet_acdc", "--test_time_views", "1")
    assert len(list((elsewhere / f"{name}_out").glob("*_pred.nii.gz"))) == 2


def test_a_folder_says_what_was_skipped(autosam_says, volume):
    done = autosam_says("segment", volume.parent, "--bundle", "unet_acdc", "--test_time_views", "1")[1]
    assert done.startswith("segmented 2 images with unet_acdc; 2 skipped, see the log")


def test_what_was_segmented_is_said_though_an_image_failed(autosam_says, volume, elsewhere):
    (elsewhere / "images").mkdir()
    shutil.copy(volume, "images/whole.nii.gz")
    (elsewhere / "images/cut.nii.gz").write_bytes(volume.read_bytes()[:2000])
    _, done, *_, error = autosam_says("segment", "images", "--bundle", "unet_acdc", "--test_time_views", "1")
    assert done.startswith("segmented 1 image with unet_acdc")
    assert error.startswith("error: 1 of 2 volumes failed: images/cut.nii.gz")


def test_warnings_of_the_project_are_shown_and_monais_are_not(autosam_says):
    image = np.random.default_rng(0).integers(0, 100, (64, 56, 2)).astype(np.int16)
    image[0, 0] = -9999
    nib.save(nib.Nifti1Image(image, np.diag([1.5, 1.5, 10, 1])), "volume.nii.gz")
    autosam_says("segment", "volume.nii.gz", "--bundle", "unet_acdc", "--test_time_views", "1")
    shown = autosam_says.shown
    assert "warning: volume.nii.gz: 2 voxels hold -9999" in shown
    assert "_target_" not in shown
    assert "_target_" in Path("segmented", LOG).read_text()


def test_bundles_are_found_by_name_and_by_folder(elsewhere):
    assert find_bundle("unet_acdc") == SHIPPED / "unet_acdc"
    copy = own_copy(find_bundle("unet_acdc"))
    assert copy == Path("unet_acdc") == find_bundle("unet_acdc")
    assert own_copy(copy) == copy
    (elsewhere / "cnnhead_acdc").mkdir()
    with pytest.raises(FileExistsError, match="in the way"):
        own_copy(SHIPPED / "cnnhead_acdc")


def test_typed_knobs_keep_their_text():
    typed = ["--steps", "300", "--seed=1", "--resume", "--a", "-1"]
    assert typed_knobs(typed) == {"steps": "300", "seed": "1", "resume": "True", "a": "-1"}


def test_serving_starts_the_server_of_the_studies(autosam_says, volume, monkeypatch):
    started: list[list[str]] = []
    monkeypatch.setattr("serving.__main__.os.execve", lambda _, command, __: started.append(command))
    monkeypatch.setattr("serving.__main__.assemble_app", lambda app_dir, bundles: (app_dir, bundles))
    autosam_says("serve", volume.parent, "--bundle", "unet_acdc", "--port", 8001)
    ((*_, studies, _, host, _, port, _, _, bundles),) = started
    assert (studies, host, port, bundles) == (str(volume.parent), "127.0.0.1", "8001", "unet_acdc")
    assert "expected --studies to be the folder" in autosam_says("serve", "missing")[-1]


def test_packing_takes_the_model_that_a_copy_has_trained(autosam_says, phantoms):
    autosam_says("train", "unet_acdc", "--data", phantoms, *SHORT)
    (archive,) = Path(re.match(r"packed unet_acdc: (\S+)", autosam_says("pack", "unet_acdc")[-2])[1]).parent.glob(
        "*.zip"
    )
    with zipfile.ZipFile(archive) as files:
        assert files.read("unet_acdc/models/model.pt") == Path("unet_acdc/models/model.pt").read_bytes()


def test_a_study_runs_in_one_command(autosam_says, monkeypatch):
    ran = []
    monkeypatch.setattr("study.__main__.run", lambda *args, **options: ran.append((args, options)))
    autosam_says("study", "grid.json", "-o", "out", "--workers", 2)
    assert ran == [(("grid.json", "out", ""), {"only": "", "workers": 2, "retry": False, "dry_run": False})]


def test_info_names_what_is_found(autosam_says):
    said = "\n".join(autosam_says("info"))
    for bundle in shipped_bundles():
        assert bundle in said
    assert torch.__version__ in said


@pytest.mark.slow
def test_the_demo_ends_with_a_score_and_a_picture(autosam_says, elsewhere):
    lines = autosam_says("demo")
    assert float(re.search(r"mean Dice (0\.\d+)", "\n".join(lines))[1]) > 0.9
    assert (elsewhere / re.search(r"look at: (\S+)", "\n".join(lines))[1]).is_file()


@pytest.mark.slow
def test_a_wheel_in_a_bare_environment_segments_and_trains_away_from_the_repository(tmp_path, phantoms, volume):
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (REPOSITORY / name).is_file(), tracked.splitlines()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name)
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    pip = [str(python), "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path / "dist"), str(source)], check=True)
    (wheel,) = (tmp_path / "dist").glob("autosam_bundles-*.whl")
    constraints = str(REPOSITORY / "constraints.txt")
    subprocess.run([*pip, "install", "-c", constraints, "torch"], check=True)
    subprocess.run([*pip, "install", "-c", constraints, str(wheel)], check=True)
    shutil.rmtree(source)
    work = tmp_path / "work"
    work.mkdir()
    for command in (
        ["info"],
        ["segment", str(volume), "--bundle", "unet_acdc"],
        ["train", "unet_acdc", "--data", str(phantoms), "--labelled", "1", *SHORT],
        ["evaluate", "unet_acdc"],
    ):
        subprocess.run([str(python.parent / "autosam"), *command], cwd=work, check=True)
    assert len(list((work / "segmented").glob("*_pred.nii.gz"))) == 1
    assert (work / "unet_acdc/eval/summary.csv").is_file()
