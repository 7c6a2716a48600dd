"""The bundles through MONAI's own entry points, on synthetic patients and the tiny encoder with random weights."""

import csv
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_monai_bundle, run_monai_bundle_here, succeeds
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out
from monai.metrics import SurfaceDistanceMetric
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adapt.template import networks
from components.phantom.dataset import write_phantom_dataset

HEADS = tuple(f"{name}_acdc" for name, network in networks().items() if network["kind"] == "encoder")
BUNDLES = tuple(f"{name}_acdc" for name in networks())
SLOW = ("autosam_acdc", "cnnhead_acdc")  # heads of millions of weights, on fine tokens
DEAR_EXPORTS = (*SLOW, "deeplabhead_acdc")
CHEAPEST = "linearhead_acdc"  # of which each workflow also runs as a command, which starts a process


def dear_ones_slow(bundles):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in bundles]


TINY = {"model_type": "vit_tiny", "sam_checkpoint": "$None", "image_size": 64}
REAL_SLICES_ALONE = {"phantom_share": 0, "test_time_views": 1}
CLASSES = ("RV", "Myo", "LV")


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> str:
    """Four patients: two train, one validates, one tests."""
    return write_phantom_dataset(str(tmp_path_factory.mktemp("data") / "phantoms"), patients=4, size_hw_d=(64, 48, 4))


def config(bundle: str, *names: str) -> list[str]:
    return [str(REPOSITORY / "bundles" / bundle / "configs" / f"{name}.json") for name in names]


def knobs(bundle: str, **others) -> dict:
    """Overrides for a quick run of any bundle; one that trains keeps its embeddings beside its checkpoints."""
    training = REAL_SLICES_ALONE if "ckpt_dir" in others else {}
    if bundle == "unet_acdc":
        return {"width": 2, "start_checkpoint": "$None", **training, **others}
    cache = {"cache_dir": str(others["ckpt_dir"]) + "_embeddings"} if "ckpt_dir" in others else {}
    return {**TINY, **training, **cache, **others}


def run(bundle: str, run_id: str, *names: str, as_command: bool = False, **overrides) -> str:
    """Run MONAI's runner from inside a bundle: in this process, or as a user would; returns what it says."""
    options = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    arguments = ("run", run_id, "--config_file", str(config(bundle, *names)), *options)
    folder = REPOSITORY / "bundles" / bundle
    if as_command:
        return succeeds(run_monai_bundle(*arguments, cwd=folder))
    return run_monai_bundle_here(*arguments, cwd=folder)


@pytest.fixture(scope="session", params=BUNDLES)
def trained(request, phantoms, tmp_path_factory) -> tuple[str, Path]:
    """A bundle after two epochs of training, its folders below one temporary folder."""
    folder = tmp_path_factory.mktemp(request.param)
    overrides = knobs(
        request.param, dataset_dir=phantoms, ckpt_dir=folder / "models", output_dir=folder / "eval", epochs=2
    )
    run(request.param, "training", "train", **overrides, val_interval=1)
    return request.param, folder


@pytest.mark.parametrize("bundle", BUNDLES)
def test_bundle_has_every_file_of_a_zoo_bundle(bundle):
    of_head = ("large_files.yml", "configs/sam.json", "configs/neck.json", "configs/correct.json")
    of_unet = ("configs/from_scratch.json", "configs/phantoms.json", "configs/pretrain.json")
    for name in (
        *(of_head if bundle in HEADS else of_unet),
        "LICENSE",
        "docs/README.md",
        "docs/data_license.txt",
        "configs/metadata.json",
        "configs/train.json",
        "configs/evaluate.json",
        "configs/inference.json",
        "configs/inference_ts.json",
        "configs/inference_trt.json",
        "configs/inference_onnx.json",
        "configs/inference_deploy.json",
        "configs/function.json",
        "configs/unlabelled.json",
        "configs/demo.json",
        "configs/multi_gpu_train.json",
        "configs/multi_gpu_evaluate.json",
        "configs/logging.conf",
    ):
        assert (REPOSITORY / "bundles" / bundle / name).is_file(), name


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_follows_the_schema(bundle, metadata_schema, tmp_path):
    local = shutil.copy(metadata_schema, tmp_path / "schema.json")
    verify_metadata(meta_file=config(bundle, "metadata")[0], filepath=local)


OVERLAID = [("train", "unlabelled"), ("train", "demo"), ("inference", "function"), ("inference", "correct")]
OVERLAID += [("train", "multi_gpu_train"), ("train", "evaluate", "multi_gpu_evaluate")]
OF_HEADS = [("train", "neck"), ("train", "unlabelled", "neck")]
OF_HEADS += [("train", "sam"), ("train", "evaluate", "sam"), ("inference", "sam")]
OF_UNET = [("train", "from_scratch"), ("train", "phantoms"), ("train", "pretrain")]
WORKFLOWS = [(bundle, names) for bundle in BUNDLES for names in (("train",), ("train", "evaluate"), ("inference",))]
WORKFLOWS += [(bundle, names) for bundle in (CHEAPEST, "unet_acdc") for names in OVERLAID]
WORKFLOWS += [(CHEAPEST, names) for names in OF_HEADS] + [("unet_acdc", names) for names in OF_UNET]


@pytest.mark.parametrize(("bundle", "names"), WORKFLOWS, ids=str)
def test_workflow_has_every_property(bundle, names, phantoms, tmp_path, request, monkeypatch):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    overrides = knobs(bundle, dataset_dir=phantoms, output_dir=str(tmp_path), ckpt_dir=str(tmp_path))
    overrides["labelled_cases"] = 1
    if "sam" in names:
        overrides |= {"model_type": "vit_b", "sam_checkpoint": request.getfixturevalue("sam_checkpoint")}
    if "correct" in names:
        checkpoint = request.getfixturevalue("tiny_sam_checkpoint")
        overrides |= {"sam_checkpoint": checkpoint, "clicks": {"LV": [[1, 2, 3]]}}
    if "demo" in names:
        overrides |= {"demo_dir": str(tmp_path), "dataset_dir#patients": 4}
        del overrides["dataset_dir"]
    if set(names) & {"neck", "unlabelled"}:
        overrides.pop("cache_dir", None)
    if names[0] == "inference":
        overrides.pop("cache_dir", None)
        overrides["ckpt_path"] = str(Path(overrides.pop("ckpt_dir")) / "model.pt")
    workflow = ConfigWorkflow(
        config(bundle, *names),
        workflow_type="infer" if names[0] == "inference" else "train",
        logging_file=False,
        **overrides,
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    if "finalize" in workflow.parser:
        workflow.finalize()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_network_takes_and_gives_what_the_metadata_say(bundle):
    verify_net_in_out(
        net_id="network_def",
        config_file=config(bundle, "inference")[0],
        meta_file=config(bundle, "metadata")[0],
        device="cpu",
        **knobs(bundle),
    )


@pytest.mark.parametrize(
    "trained",
    [pytest.param(name, marks=pytest.mark.slow) if name in DEAR_EXPORTS else name for name in BUNDLES],
    indirect=True,
)
def test_exported_torchscript_equals_the_trained_network_and_segments_alone(trained, phantoms, tmp_path):
    bundle, folder = trained
    inference = config(bundle, "inference")[0]
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(folder / "models" / "model.pt"),
        meta_file=config(bundle, "metadata")[0],
        config_file=inference,
        **knobs(bundle, bundle_root=str(folder)),
    )
    parser = ConfigParser()
    parser.read_config(inference)
    parser.update(knobs(bundle, bundle_root=str(folder), precision="fp32"))  # as exported
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(folder / "models" / "model.pt", weights_only=True))
    images = torch.rand(2, 3, 256, 256) * 255
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(images), network(images))

    volume = next(Path(phantoms).rglob("*frame01.nii.gz"))
    saved = {}
    for name, given in {"eager": {"ckpt_path": folder / "models/model.pt", "precision": "fp32"}, "ts": {}}.items():
        overlays = () if name == "eager" else ("inference_ts",)
        given |= {} if name == "eager" else {"ts_path": tmp_path / "model.ts"}
        given |= {"sam_checkpoint": "no such file"} if name == "ts" and bundle in HEADS else {}
        overrides = knobs(bundle) | {"dataset_dir": volume, "output_dir": tmp_path / name} | given
        run(bundle, "inferring", "inference", *overlays, **overrides)
        saved[name] = np.asarray(nib.load(next((tmp_path / name).iterdir())).dataobj)
    assert np.array_equal(saved["ts"], saved["eager"])


def test_training_leaves_what_was_trained_and_the_last_epochs(trained):
    bundle, folder = trained
    written = sorted(path.name for path in (folder / "models").iterdir())
    assert written == ["checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt", "model.pt"]
    state = torch.load(folder / "models" / "model.pt", weights_only=True)
    assert [key for key in state if key.startswith("encoder.")] == ["encoder.fingerprint"] * (bundle in HEADS)


def test_tensorboard_has_losses_scores_and_pictures_of_every_validation(trained):
    _, folder = trained
    (file,) = (folder / "eval").glob("events.out.tfevents.*")  # TensorBoard follows one file of a folder
    events = EventAccumulator(str(file)).Reload()
    scores = {"val_mean_dice", *(f"val_mean_dice_{name}" for name in CLASSES)}
    assert {"train_loss", "train_mean_loss", *scores} <= set(events.Tags()["scalars"])
    for tag in ("input_0_HW_0", "input_1_HW_0", "output_HW_0"):
        assert events.Images(tag)[-1].step == 2
    truth = Image.open(io.BytesIO(events.Images("input_1_HW_0")[-1].encoded_image_string))
    assert len(truth.convert("L").getcolors()) == 4  # background and three classes


def looked_up_and_encoded(output: str) -> tuple[int, int]:
    """What the last line about the embedding cache says of a run."""
    counts = re.findall(r"this run looked up (\d+), encoded (\d+)", output)
    return int(counts[-1][0]), int(counts[-1][1])


def test_each_image_is_encoded_once_for_all_epochs_validations_and_heads(phantoms, tmp_path):
    # Of four patients of four slices a frame two are trained on, 16 slices in two views, and one validates, 8 slices.
    shared = {"dataset_dir": phantoms, "output_dir": tmp_path / "eval", "cache_dir": tmp_path / "embeddings"}
    training = {"labelled_cases": "$None", "views": 2, "epochs": 3, "val_interval": 1}
    for bundle in ("autosam_acdc", "linearhead_acdc"):
        overrides = knobs(bundle, **shared, **training, ckpt_dir=tmp_path / bundle)
        counts = looked_up_and_encoded(run(bundle, "training", "train", **overrides))
        assert counts == (3 * (16 + 8), 2 * 16 + 8 if bundle == HEADS[0] else 0)
    overrides = knobs(HEADS[0], **shared, ckpt_dir=tmp_path / HEADS[0])
    for n_encoded in (8, 0):
        output = run(HEADS[0], "evaluating", "train", "evaluate", **overrides)
        assert str(tmp_path / "embeddings") in output
        assert looked_up_and_encoded(output) == (8, n_encoded)


@pytest.mark.parametrize(
    "trained",
    [CHEAPEST, *(pytest.param(name, marks=pytest.mark.slow) for name in HEADS if name != CHEAPEST)],
    indirect=True,
)
def test_predictions_are_the_same_with_and_without_the_cache(trained, phantoms, tmp_path):
    bundle, folder = trained
    predictions = {}
    for name, cache in {
        "none": {"cache_dir": "$None"},
        "float32": {"cache_dir": tmp_path / "full", "network_def#encoder#cache_dtype": "float32"},
        "float16": {"cache_dir": tmp_path / "half"},
    }.items():
        overrides = knobs(bundle, dataset_dir=phantoms, ckpt_dir=folder / "models", output_dir=tmp_path / name)
        run(bundle, "evaluating", "train", "evaluate", **{**overrides, **cache})
        files = sorted((tmp_path / name).glob("*_pred.nii.gz"))
        predictions[name] = np.stack([np.asarray(nib.load(file).dataobj) for file in files])
    assert np.array_equal(predictions["float32"], predictions["none"])
    assert (predictions["float16"] != predictions["none"]).mean() < 0.001


@pytest.mark.parametrize("trained", dear_ones_slow(BUNDLES), indirect=True)
def test_resumed_training_goes_on_after_the_last_epoch(trained, phantoms, tmp_path):
    bundle, folder = trained
    models = tmp_path / "models"
    shutil.copytree(folder / "models", models)
    overrides = knobs(bundle, dataset_dir=phantoms, ckpt_dir=models, output_dir=tmp_path / "eval")
    output = run(bundle, "training", "train", **overrides, epochs=3, val_interval=1, resume=True)
    assert re.findall(r"Epoch\[(\d)\] Metrics -- train_mean_loss", output) == ["3"]
    assert (models / "checkpoint_epoch=3.pt").is_file()


@pytest.mark.parametrize("bundle", ["linearhead_acdc", "unet_acdc"])
def test_killed_training_ends_as_an_unbroken_one(bundle, phantoms, tmp_path):
    mixed = {"phantom_share": 0.5, "crop_size": 64, "train#prepare_batch#pool_size": 10}
    folders = {"dataset_dir": phantoms, "ckpt_dir": tmp_path / "models", "output_dir": tmp_path / "eval"}
    training = knobs(bundle, **folders, **mixed, epochs=3, val_interval=1, views=0, cache_dir="$None")
    if bundle == "unet_acdc":
        del training["cache_dir"]
    run(bundle, "training", "train", **training)
    last = tmp_path / "models/checkpoint_epoch=3.pt"
    unbroken = torch.load(last)
    last.unlink()
    run(bundle, "training", "train", **training, resume=True)
    resumed = torch.load(last)
    assert resumed["best_score"] == unbroken["best_score"]
    for name, value in unbroken["model"].items():
        assert torch.equal(resumed["model"][name], value), name


def test_evaluation_is_confirmed_by_the_files_it_saves(trained, phantoms):
    bundle, folder = trained
    overrides = knobs(bundle, dataset_dir=phantoms, ckpt_dir=folder / "models", output_dir=folder / "eval")
    output = run(bundle, "evaluating", "train", "evaluate", as_command=bundle == CHEAPEST, **overrides)
    assert str(folder / "eval" / "metrics.csv") in output
    with (folder / "eval" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["case", "class", "dice", "assd_mm"]
    cases = sorted({row["case"] for row in rows})
    assert len(cases) == 2
    assert len(rows) == 2 * len(CLASSES)
    for row in rows:
        check_row(row, phantoms, folder / "eval")
    for case in cases:
        assert (folder / "eval" / f"{case}_overlay.png").stat().st_size > 10_000
    assert (folder / "eval" / "summary.csv").is_file()


def check_row(row: dict, dataset_dir: str, output_dir: Path) -> None:
    """Recompute one row's Dice, and its ASSD by MONAI's metric, from the NIfTI files."""
    truth_file = next(Path(dataset_dir).rglob(f"{row['case']}_gt.nii.gz"))
    image = nib.load(str(truth_file).replace("_gt", ""))
    prediction = nib.load(output_dir / f"{row['case']}_pred.nii.gz")
    assert prediction.shape == image.shape
    assert np.array_equal(prediction.affine, image.affine)
    assert prediction.get_data_dtype() == np.uint8
    value = CLASSES.index(row["class"]) + 1
    masks = [np.asarray(file.dataobj) == value for file in (prediction, nib.load(truth_file))]
    sizes = sum(mask.sum() for mask in masks)
    if sizes == 0:
        assert row["dice"] == row["assd_mm"] == "nan"
        return
    assert float(row["dice"]) == pytest.approx(2 * (masks[0] & masks[1]).sum() / sizes, abs=1e-6)
    if all(mask.any() for mask in masks):
        metric = SurfaceDistanceMetric(include_background=True, symmetric=True)
        distance = metric(
            *(torch.tensor(mask)[None, None] for mask in masks), spacing=[float(mm) for mm in image.header.get_zooms()]
        )
        assert float(row["assd_mm"]) == pytest.approx(distance.item(), abs=1e-4)


def test_inference_segments_every_volume_of_a_folder_on_its_own_grid(trained, phantoms, tmp_path):
    bundle, folder = trained
    single = nib.load(next(Path(phantoms).rglob("*_frame12.nii.gz"), next(Path(phantoms).rglob("*frame01.nii.gz"))))
    volumes = tmp_path / "volumes"
    shutil.copytree(Path(phantoms) / "training" / "patient001", volumes / "deep" / "patient001")
    nib.save(single.slicer[:, :, :1], volumes / "one_slice.nii.gz")
    overrides = knobs(
        bundle, dataset_dir=volumes, ckpt_path=folder / "models" / "model.pt", output_dir=tmp_path / "out"
    )
    run(bundle, "inferring", "inference", as_command=bundle == CHEAPEST, **overrides)
    images = [path for path in volumes.rglob("*.nii.gz") if not path.name.endswith("_gt.nii.gz")]
    assert len(images) == len(list((tmp_path / "out").iterdir())) == 3
    for path in images:
        image = nib.load(path)
        prediction = nib.load(tmp_path / "out" / path.name.replace(".nii.gz", "_pred.nii.gz"))
        assert prediction.shape == image.shape
        assert np.array_equal(prediction.affine, image.affine)
        assert set(np.unique(np.asarray(prediction.dataobj))) <= {0, 1, 2, 3}


def test_default_run_from_the_repositorys_root_trains_too(phantoms, tmp_path):
    command = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        "bundles/linearhead_acdc/configs/train.json",
    ]
    command += ["--bundle_root", "bundles/linearhead_acdc", "--dataset_dir", phantoms, "--ckpt_dir", str(tmp_path)]
    command += ["--output_dir", str(tmp_path), "--epochs", "1", "--model_type", "vit_tiny", "--image_size", "64"]
    command += ["--cache_dir", str(tmp_path / "embeddings"), "--phantom_share", "0", "--test_time_views", "1"]
    result = subprocess.run(
        [*command, "--sam_checkpoint", "$None"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    succeeds(result)
    assert (tmp_path / "model.pt").is_file()


def test_head_and_data_of_ones_own_need_an_overlay_only(phantoms, tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "my_package.py").write_text(
        "import torch\n"
        "class MyHead(torch.nn.Sequential):\n"
        "    def __init__(self, out_channels):\n"
        "        super().__init__(torch.nn.ConvTranspose2d(256, out_channels, 4, stride=4))\n"
        "def labelled_volumes(folder):\n"
        "    import glob\n"
        "    labels = sorted(glob.glob(folder + '/training/*/*_gt.nii.gz'))[:2]\n"
        "    return [{'image': label.replace('_gt', ''), 'label': label} for label in labels]\n"
    )
    monkeypatch.syspath_prepend(str(package))
    data = {"_target_": "my_package.labelled_volumes", "folder": "@dataset_dir"}
    overlay = {"out_channels": 5, "class_names": ["a", "b", "c", "d"]}
    overlay |= {"train#dataset#data": data, "validate#dataset#data": data}
    overlay |= {"network_def#head": {"_target_": "my_package.MyHead", "out_channels": "@out_channels"}}
    (tmp_path / "mine.json").write_text(json.dumps(overlay))
    files = [*config("autosam_acdc", "train"), str(tmp_path / "mine.json")]
    folders = {"dataset_dir": phantoms, "ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "eval")}
    knobs = TINY | REAL_SLICES_ALONE | folders
    monai.bundle.run("training", config_file=files, **knobs, cache_dir="$None", epochs=1)
    state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert state["head.0.weight"].shape == (256, 5, 4, 4)


@pytest.mark.parametrize("trained", dear_ones_slow(BUNDLES), indirect=True)
def test_real_volumes_are_segmented_on_their_own_grid(trained, acdc_dir, tmp_path):
    bundle, folder = trained
    patient = next(iter(sorted((Path(acdc_dir) / "training").glob("patient*"))))
    model = folder / "models" / "model.pt"
    overrides = knobs(bundle, dataset_dir=patient, ckpt_path=model, output_dir=tmp_path)
    run(bundle, "inferring", "inference", **overrides)
    predictions = sorted(tmp_path.glob("*_pred.nii.gz"))
    assert len(predictions) == 2
    for path in predictions:
        prediction, image = nib.load(path), nib.load(patient / path.name.replace("_pred", ""))
        assert prediction.shape == image.shape
        assert np.array_equal(prediction.affine, image.affine)


@pytest.mark.slow
def test_demo_learns_to_segment_patients_it_has_not_seen(tmp_path):
    run("autosam_acdc", "training", "train", "demo", as_command=True, demo_dir=tmp_path)
    run("autosam_acdc", "evaluating", "train", "evaluate", "demo", as_command=True, demo_dir=tmp_path)
    with (tmp_path / "eval" / "summary.csv").open() as file:
        scores = {row["class"]: float(row["dice_mean"]) for row in csv.DictReader(file)}
    assert scores["mean"] > 0.7, scores


def start_training(folder: Path, phantoms: str, embeddings: Path) -> subprocess.Popen:
    overrides = {"dataset_dir": phantoms, "cache_dir": embeddings, "ckpt_dir": folder, "output_dir": folder}
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", *config("linearhead_acdc", "train")]
    overrides |= {"image_size": 256, "epochs": 20, "views": 20, "val_interval": 1, "precision": "fp32"}
    for name, value in {**TINY, **REAL_SLICES_ALONE, **overrides}.items():
        command += [f"--{name}", str(value)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=REPOSITORY / "bundles" / "linearhead_acdc", **quiet)


@pytest.mark.slow
def test_killed_and_concurrent_runs_leave_no_wrong_embedding(phantoms, tmp_path):
    embeddings = tmp_path / "embeddings"
    random = np.random.default_rng(0)
    counts = []
    for _ in range(20):
        runs = [start_training(tmp_path / name, phantoms, embeddings) for name in ("first", "second")]
        begun = time.monotonic()
        n_before = len(list(embeddings.glob("*/*.npy")))
        while len(list(embeddings.glob("*/*.npy"))) == n_before and any(run.poll() is None for run in runs):
            assert time.monotonic() - begun < 120
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        for killed in runs:
            killed.kill()
            killed.wait()
        counts.append(len(list(embeddings.glob("*/*.npy"))))
    assert len(set(counts)) > 10, counts  # killed while filling, not before or after
    check_embeddings(phantoms, embeddings, n_expected=counts[-1])


def check_embeddings(dataset_dir: str, folder: Path, *, n_expected: int) -> None:
    """Encode every training view and validation slice anew and compare with what the folder holds of them."""
    parser = ConfigParser()
    parser.read_config(config("linearhead_acdc", "train"))
    parser.update({**TINY, "image_size": 256, "dataset_dir": dataset_dir, "cache_dir": str(folder), "views": 20})
    encoder = parser.get_parsed_content("network_def#encoder")
    views, volumes = parser.get_parsed_content("train#dataset"), parser.get_parsed_content("validate#dataset")
    images = [torch.movedim(volume["image"], 3, 0) for volume in volumes]
    for epoch in range(1, 21):
        views.set_epoch(epoch)
        images.append(torch.stack([views[index]["image"] for index in range(len(views))]))
    namespace, n_found = encoder._namespace("cpu"), 0
    for image in torch.cat(images).as_subclass(torch.Tensor):
        stored = encoder.cache.get(encoder.cache.key(namespace, image))
        if stored is not None:
            n_found += 1
            fresh = encoder._encode(image[None])[0]
            # Half a unit in the last place of fp16, and the last bits of fp32 that depend on the batch.
            torch.testing.assert_close(stored.float(), fresh, rtol=2**-11, atol=1e-5)
    assert n_found == n_expected


@pytest.mark.slow
def test_vit_b_at_full_size_trains_on_the_cpu(phantoms, sam_checkpoint, tmp_path):
    overrides = {"dataset_dir": phantoms, "sam_checkpoint": sam_checkpoint, "ckpt_dir": tmp_path, "views": 1}
    overrides |= {"cache_dir": tmp_path / "embeddings", "output_dir": tmp_path, "epochs": 1, "val_interval": 1}
    run("linearhead_acdc", "training", "train", "sam", as_command=True, **overrides)
    assert (tmp_path / "model.pt").stat().st_size < 400_000
