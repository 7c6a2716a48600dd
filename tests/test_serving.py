"""MONAI Label's server with the bundles, as the README starts it."""

import contextlib
import errno
import http.server
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from label_server import served
from PIL import Image
from test_custom_data import decathlon, plain, trained
from test_release import own_bundle
from test_release import trained as trained_with

from adapt.new import new_bundle
from components.data.acdc import list_patients
from components.phantom.dataset import write_phantom_dataset
from components.sam.encoder import SamEncoder
from release.bundles import PACKED
from serving.__main__ import serve
from serving.app import assemble_app

LABELS = {"rv": 1, "myo": 2, "lv": 3}
SMALL = {"max_epochs": 1}


@pytest.fixture
def replaced_by(monkeypatch) -> dict:
    """Return the command line and environment with which `serve` would start MONAI Label's server."""
    seen: dict = {}
    monkeypatch.setattr(
        "serving.__main__.os.execve", lambda _, *given: seen.update(zip(("command", "env"), given, strict=True))
    )
    monkeypatch.setattr("serving.__main__.assemble_app", lambda app_dir, bundles: (app_dir, bundles))
    monkeypatch.setattr("serving.__main__.shutil.which", lambda *_, **__: "itkimage2segimage")
    monkeypatch.delenv("MONAI_LABEL_DICOMWEB_SEARCH_FILTER", raising=False)
    return seen


@pytest.fixture
def dicomweb():
    """A function that starts a server which answers every GET with a status, and returns its address."""
    started = []

    def start(status: int) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        started.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/dicom-web"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def test_serving_without_monai_label_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.app.importlib.util.find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"no MONAI Label in .*docs/serving\.md"):
        assemble_app(tmp_path / "app")
    with pytest.raises(ValueError, match="no bundle acdc to serve: expected some of autosam_acdc"):
        assemble_app(tmp_path / "app", ["acdc"])
    assert not (tmp_path / "app").exists()


def test_app_is_assembled_once_and_keeps_what_bundles_learn(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.app.importlib.util.find_spec", lambda name: name)
    app, _ = assemble_app(tmp_path / "app", ["linearhead_acdc"])
    model = app / "model/linearhead_acdc/models/model.pt"
    model.write_bytes(b"learned")
    assemble_app(app, ["linearhead_acdc", "cnnhead_acdc"])
    assert model.read_bytes() == b"learned"
    assert {path.name for path in (app / "model").iterdir()} == {"linearhead_acdc", "cnnhead_acdc"}
    assert "torchvision" in (app / "sitecustomize.py").read_text()
    assert "class App(MONAILabelApp)" in (app / "main.py").read_text()


def served_config(app: Path, name: str) -> dict:
    return json.loads((app / f"model/cells/configs/{name}.json").read_text())


@pytest.mark.parametrize("encoder", [None, SamEncoder("phantom_unet")], ids=["shipped", "own"])
def test_own_bundle_with_a_head_trains_on_as_it_was_trained(encoder, tmp_path, monkeypatch):
    bundle = trained_with(own_bundle(tmp_path, encoder), image_size=64, canvas_size=48)
    monkeypatch.setattr("serving.app.importlib.util.find_spec", lambda name: name)
    app, names = assemble_app(tmp_path / "app", [str(bundle)])
    assert names == ["cells"]
    before, train = json.loads((bundle / "configs/train.json").read_text()), served_config(app, "train")
    given = {"image_size": 64, "canvas_size": 48, "start_checkpoint": "$@bundle_root + '/models/model.pt'"}
    assert {name: train[name] for name in given} == given
    assert "width" not in train
    assert served_config(app, "data")["label_values"] == [0, 1]
    assert train["sam_checkpoint"] == before["sam_checkpoint"] == served_config(app, "inference")["sam_checkpoint"]
    assert isinstance(train["sam_checkpoint"], str) == (encoder is not None)  # a file of one's own stays where it is


def test_mistyped_studies_are_refused_and_not_made(tmp_path, replaced_by):
    with pytest.raises(SystemExit, match=f"there is no folder {tmp_path}/volums: expected --studies to be the folder"):
        serve(f"{tmp_path}/volums")
    assert not any(tmp_path.iterdir())
    assert not replaced_by


@pytest.mark.parametrize(
    ("status", "said"),
    [(404, "answers 404 Not Found: expected --studies to be the root"), (None, "no server answers at")],
)
def test_an_address_without_a_dicomweb_server_is_refused(status, said, dicomweb, replaced_by, tmp_path):
    address = dicomweb(status) if status else "http://127.0.0.1:9/dicom-web"
    with pytest.raises(SystemExit, match=said):
        serve(address, str(tmp_path / "app"))
    assert not replaced_by


def test_mr_series_are_served_from_dicomweb_unless_another_filter_is_given(
    dicomweb, replaced_by, tmp_path, monkeypatch
):
    def searched(**options: str) -> dict:
        serve(dicomweb(200), str(tmp_path / "app"), **options)
        return json.loads(replaced_by["env"]["MONAI_LABEL_DICOMWEB_SEARCH_FILTER"])

    assert searched() == {"Modality": "MR"}
    assert searched(modality="CT") == {"Modality": "CT"}
    assert replaced_by["env"]["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    monkeypatch.setenv("MONAI_LABEL_DICOMWEB_SEARCH_FILTER", '{"PatientID": "7"}')
    assert searched() == {"PatientID": "7"}


def test_dicomweb_without_dcmqi_is_refused(dicomweb, replaced_by, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.__main__.shutil.which", lambda *_, **__: None)
    with pytest.raises(SystemExit, match=r"itkimage2segimage, which writes DICOM SEG, is missing: install it"):
        serve(dicomweb(200), str(tmp_path / "app"))
    assert not replaced_by


@pytest.fixture(scope="module")
def patients(tmp_path_factory, request) -> list[dict[str, str]]:
    """The end-diastolic volume and label of three patients, real ones where they are at hand."""
    try:
        root = request.getfixturevalue("acdc_dir")
    except pytest.skip.Exception:
        root = write_phantom_dataset(str(tmp_path_factory.mktemp("data") / "phantoms"), patients=3)
    return [cases[0] for cases in list(list_patients(root).values())[:3]]


@pytest.fixture(scope="module")
def server(label_python, patients, tmp_path_factory):
    """A client of the running server, the folder of its app and that of its studies."""
    folder = tmp_path_factory.mktemp("served")
    studies = folder / "studies"
    studies.mkdir()
    for case in patients:
        (studies / Path(case["image"]).name).write_bytes(Path(case["image"]).read_bytes())
    with served(label_python, folder, studies) as client:
        yield client, folder / "app", studies


def read(content: bytes, path: Path) -> nib.Nifti1Image:
    path.write_bytes(content)
    return nib.load(path)


@pytest.mark.slow
def test_server_offers_the_bundles_by_what_they_are_worth(server):
    info = json.loads(server[0].ask("GET", "/info/"))
    models = {name: model for name, model in info["models"].items() if not name.endswith("_clicks")}
    assert models.keys() == info["trainers"].keys() == set(PACKED)
    assert info["models"].keys() - models.keys() == {f"{name}_clicks" for name in PACKED}
    assert all(model["labels"] == LABELS for model in models.values())
    assert next(iter(models)) == next(iter(info["trainers"])) == "linearhead_acdc"
    worth = [model["dice_without_labels"] / model["relative_seconds"] for model in models.values()]
    assert worth == sorted(worth, reverse=True)
    assert len({model["description"] for model in models.values()}) == len(PACKED)
    rows = (REPOSITORY / "docs/results.md").read_text().splitlines()
    row_of = {
        "autosam": "| ViT head",
        "cnnhead": "| CNN head",
        "deeplabhead": "| DeepLab head",
        "linearhead": "| linear head |",
        "unet": "| UNet |",
    }
    for bundle, model in models.items():
        row = next(row for row in rows if row_of[bundle.removesuffix("_acdc")] in row and "±" in row)
        assert f"{model['dice_without_labels']}" in row.split("|")[2]
        assert f"{model['dice_without_labels']} %" in model["description"]


@pytest.mark.slow
@pytest.mark.parametrize("bundle", PACKED)
def test_bundle_segments_learns_from_what_the_server_offers_and_segments_anew(bundle, server, patients, tmp_path):
    client, app, studies = server
    image = Path(patients[0]["image"])
    name = image.name.removesuffix(".nii.gz")

    def segmented(file: str) -> np.ndarray:
        answer = read(client.ask("POST", f"/infer/{bundle}", image=name, output="image"), tmp_path / file)
        assert answer.shape == nib.load(image).shape
        assert answer.get_data_dtype() == np.uint8
        assert np.array_equal(answer.affine, nib.load(image).affine)
        return np.asarray(answer.dataobj)

    first = segmented("first.nii.gz")
    assert np.unique(first).tolist() == [0, 1, 2, 3]
    sent = client.send("POST", f"/infer/{bundle}", "file", image, output="image")
    assert np.array_equal(np.asarray(read(sent, tmp_path / "sent.nii.gz").dataobj), first)

    for case in patients:
        study = Path(case["image"]).name.removesuffix(".nii.gz")
        client.send("PUT", "/datastore/label", "label", Path(case["label"]), image=study, tag="final")
    model = app / "model" / bundle / "models/model.pt"
    before = model.read_bytes()
    old = {"run_id": "", "tracking": "None", "tracking_uri": "", "client_id": None}  # as other clients send along
    client.post(f"/train/{bundle}", client.offered(bundle) | old | SMALL | {"val_split": 0.0}, run_sync="true")
    assert model.read_bytes() != before
    assert not np.array_equal(segmented("second.nii.gz"), first)
    stats = json.loads(client.ask("GET", "/info/"))["train_stats"][bundle]
    assert (stats["epoch"], stats["training_cases"], stats["validation_cases"]) == (1, len(patients), 0)
    assert stats["total_time"] > 0

    client.post(f"/batch/infer/{bundle}", {}, images="all", run_sync="true")
    saved = {path.name for path in (studies / "labels/original").glob("*.nii.gz")}
    assert saved == {Path(case["image"]).name for case in patients}


def ended(client, path: str) -> dict:
    """The status of what runs in the background, once it has ended."""
    while True:
        status = json.loads(client.ask("GET", path))
        if status["status"] not in ("SUBMITTED", "RUNNING"):
            return status
        time.sleep(1)


@pytest.mark.slow
def test_training_in_the_background_with_the_offered_settings_finishes(server, patients):
    client, _, _ = server
    for case in patients:
        study = Path(case["image"]).name.removesuffix(".nii.gz")
        client.send("PUT", "/datastore/label", "label", Path(case["label"]), image=study, tag="final")
    client.post("/train/", {"linearhead_acdc": client.offered("linearhead_acdc") | SMALL})  # as OHIF asks
    assert ended(client, "/train/")["status"] == "DONE"
    stats = json.loads(client.ask("GET", "/info/"))["train_stats"]["linearhead_acdc"]
    assert 0 < stats["start_metric"] <= stats["best_metric"] <= 1
    assert stats["validation_cases"] == 1


def mean_dice(pred: np.ndarray, case: dict[str, str]) -> float:
    truth = np.asarray(nib.load(case["label"]).dataobj)
    return float(
        np.mean(
            [2 * ((pred == k) & (truth == k)).sum() / ((pred == k).sum() + (truth == k).sum()) for k in LABELS.values()]
        )
    )


@pytest.mark.slow
def test_what_is_trained_on_is_segmented_better(label_python, patients, tmp_path):
    studies = tmp_path / "studies"
    studies.mkdir()
    case = patients[0]
    (studies / "heart.nii.gz").write_bytes(Path(case["image"]).read_bytes())
    with served(label_python, tmp_path, studies, "--bundle", "unet_acdc") as client:

        def score(file: str) -> float:
            answer = client.ask("POST", "/infer/unet_acdc", image="heart", output="image")
            return mean_dice(np.asarray(read(answer, tmp_path / file).dataobj), case)

        assert json.loads(client.ask("POST", "/activelearning/first", b"{}"))["id"] == "heart"
        before = score("before.nii.gz")
        client.send("PUT", "/datastore/label", "label", Path(case["label"]), image="heart", tag="final")
        client.post(
            "/train/unet_acdc", client.offered("unet_acdc") | {"max_epochs": 5}
        )  # one case: none to validate on
        assert ended(client, "/train/")["status"] == "DONE"
        assert score("after.nii.gz") > before


@pytest.mark.slow
def test_training_that_does_not_start_from_the_model(server, patients):
    client, app, _ = server
    case, model = patients[0], app / "model/linearhead_acdc/models/model.pt"
    study = Path(case["image"]).name.removesuffix(".nii.gz")
    client.send("PUT", "/datastore/label", "label", Path(case["label"]), image=study, tag="final")
    before = model.read_bytes()
    client.post("/train/linearhead_acdc", SMALL | {"pretrained": False, "val_split": 0.0}, run_sync="true")
    assert model.read_bytes() != before


@pytest.mark.slow
def test_a_batch_goes_on_past_images_that_cannot_be_segmented(label_python, patients, tmp_path):
    studies = tmp_path / "studies"
    studies.mkdir()
    image = Path(patients[0]["image"])
    (studies / "b.nii.gz").write_bytes(image.read_bytes())
    (studies / "a.nii.gz").write_bytes(image.read_bytes()[:2000])
    with served(label_python, tmp_path, studies, "--bundle", "linearhead_acdc") as client:
        assert client.refusal("POST", "/batch/infer/nohead_acdc")[0] == 422
        answer = client.post("/batch/infer/linearhead_acdc", {}, run_sync="true")
        assert "expected a complete NIfTI file" in answer["a"]["left_out"]
        assert answer["b"]["label"] == "b"
        (studies / "labels/original/b.nii.gz").unlink()
        client.post("/batch/infer/linearhead_acdc", {})
        status = ended(client, "/batch/infer")
        assert status["status"] == "DONE"
        assert status["left_out"] == {"a": answer["a"]["left_out"]}
        assert nib.load(studies / "labels/original/b.nii.gz").shape == nib.load(image).shape
        status, said = client.refusal("POST", "/activelearning/nope")
        offered = "lowest_predicted_dice, random, first, most_different_embedding"
        assert (status, said) == (422, f"there is no strategy nope: expected one of {offered}")


@pytest.mark.slow
def test_others_are_answered_while_an_inference_waits(label_python, patients, tmp_path):
    studies = tmp_path / "studies"
    studies.mkdir()
    image = Path(patients[0]["image"])
    (studies / "other.nii.gz").write_bytes(image.read_bytes())
    os.mkfifo(studies / "pipe.nii.gz")  # whoever reads it waits for a writer
    with served(label_python, tmp_path, studies, "--bundle", "linearhead_acdc") as client, ThreadPoolExecutor() as pool:
        waiting = [
            pool.submit(client.refusal, "POST", "/infer/linearhead_acdc", image=name, output="json")
            for name in ["pipe"] * 2
        ]
        pipe = opened_by_reader(studies / "pipe.nii.gz")
        for _ in range(3):
            assert "linearhead_acdc" in json.loads(client.ask("GET", "/info/"))["models"]
            assert json.loads(client.ask("GET", "/datastore/"))["total"] == 2
            assert client.refusal("GET", "/train/")[0] == 404  # none has been started
            query = {"image": "other", "tag": "draft"}
            client.send("PUT", "/datastore/label", "label", Path(patients[0]["label"]), **query)
        assert not any(one.done() for one in waiting)
        os.close(pipe)
        while not all(one.done() for one in waiting):
            with contextlib.suppress(OSError):
                os.close(os.open(studies / "pipe.nii.gz", os.O_WRONLY | os.O_NONBLOCK))
            time.sleep(0.05)
        assert {one.result()[0] for one in waiting} == {422}
        client.ask("POST", "/infer/linearhead_acdc", image="other", output="json")


def opened_by_reader(pipe: Path) -> int:
    """A pipe, opened for writing as soon as somebody waits to read it."""
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "network"), [("volumes", "unet"), ("pictures", "unet"), ("pictures", "linearhead")])
def test_a_bundle_for_ones_own_data_segments_learns_and_segments_anew(kind, network, label_python, tmp_path):
    data = decathlon(tmp_path / "data") if kind == "volumes" else plain(tmp_path / "data", mode="L")
    torch.manual_seed(0)
    bundle = trained(new_bundle("organ", data, tmp_path, network=network)[0])
    cases = json.loads((bundle / "configs/data.json").read_text())["training"][:2]
    studies = tmp_path / "studies"
    studies.mkdir()
    for case in cases:
        (studies / Path(case["image"]).name).write_bytes((data / case["image"]).read_bytes())
    image = studies / Path(cases[0]["image"]).name
    with served(label_python, tmp_path, studies, "--bundle", str(bundle)) as client:

        def segmented() -> np.ndarray:
            (tmp_path / image.name).write_bytes(
                client.ask("POST", "/infer/organ", image=image.name.partition(".")[0], output="image")
            )
            if kind == "pictures":
                answer = Image.open(tmp_path / image.name)
                assert answer.size == Image.open(image).size
                return np.asarray(answer)
            answer = nib.load(tmp_path / image.name)
            assert answer.shape == nib.load(image).shape
            assert np.array_equal(answer.affine, nib.load(image).affine)
            return np.asarray(answer.dataobj)

        first = segmented()
        assert first.any()
        for case in cases:
            label = data / case["label"]
            if kind == "pictures":  # MONAI Label's clients send the indices of the classes
                label = tmp_path / label.name
                Image.fromarray(np.asarray(Image.open(data / case["label"])) // 255).save(label)
            study = label.name.partition(".")[0]
            client.send("PUT", "/datastore/label", "label", label, image=study, tag="final")
        model = tmp_path / "app/model/organ/models/model.pt"
        before = model.read_bytes()
        client.post("/train/organ", {"max_epochs": 1, "val_split": 0.0}, run_sync="true")
        assert model.read_bytes() != before
        assert not np.array_equal(segmented(), first)


def damaged(kind: str, image: Path, folder: Path) -> Path:
    """A file that no bundle can segment, made from a volume."""
    volume = nib.load(image)
    voxels = np.asarray(volume.dataobj, dtype=np.float32)
    file = folder / f"{kind}.nii.gz"
    if kind == "truncated":
        file.write_bytes(image.read_bytes()[:2000])
    elif kind == "colours":
        file = folder / "colours.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file)
    else:
        changed = {
            "plane": voxels[..., 0, None, None][..., 0, 0],
            "series": np.stack([voxels, voxels], axis=-1),
            "nan": np.where(voxels > voxels.mean(), np.nan, voxels),
            "constant": np.full_like(voxels, 7),
        }[kind]
        nib.save(nib.Nifti1Image(changed, volume.affine), file)
    return file


@pytest.mark.slow
def test_what_cannot_be_segmented_is_refused_with_the_reason(server, patients, tmp_path):
    client, app, _ = server
    log = app.with_name("log.txt")
    assert "Traceback" not in log.read_text()
    reasons = {
        "truncated": "the image sent cannot be read: expected a complete NIfTI file",
        "plane": "is not one 3D volume",
        "series": "is not one 3D volume",
        "colours": "has colours: expected grey values",
        "nan": "NaN or infinite voxels: expected finite grey values",
        "constant": "has no contrast: expected grey values that differ",
    }
    for kind, reason in reasons.items():
        file = damaged(kind, Path(patients[0]["image"]), tmp_path)
        status, said = client.refusal("POST", "/infer/linearhead_acdc", "file", file, output="image")
        assert (status, reason in said, "/tmp" in said) == (422, True, False), f"{kind}: {said}"
        assert log.read_text().count(said) == 1
    status, said = client.refusal("POST", "/infer/linearhead_acdc", image="nobody", output="image")
    assert (status, said) == (404, "there is no image nobody: GET /datastore/?output=all lists those that are")
    status, said = client.refusal("POST", "/infer/nohead_acdc", image="nobody", output="image")
    assert status == 422
    assert "nohead_acdc" in said
    assert "Traceback" not in log.read_text()


def wrong_label(kind: str, label: Path, folder: Path) -> Path:
    """A file that is no label of an image, made from one that is."""
    volume = nib.load(label)
    classes = np.asarray(volume.dataobj).astype(np.uint8)
    file = folder / f"{kind}.nii.gz"
    if kind == "junk":
        file.write_bytes(b"junk")
    else:
        changed = np.where(classes == 3, 7, classes) if kind == "value" else classes[:-3]
        nib.save(nib.Nifti1Image(changed.astype(np.uint8), volume.affine), file)
    return file


@pytest.mark.slow
def test_labels_that_a_bundle_cannot_use_are_refused_or_left_out(label_python, patients, tmp_path):
    studies = tmp_path / "studies"
    studies.mkdir()
    for case in patients:
        (studies / Path(case["image"]).name).write_bytes(Path(case["image"]).read_bytes())
    names = [Path(case["image"]).name.removesuffix(".nii.gz") for case in patients]
    with served(label_python, tmp_path, studies, "--bundle", "linearhead_acdc") as client:
        status, said = client.refusal("POST", "/train/linearhead_acdc")
        assert (status, said) == (422, "there is no label to train on: submit one first")
        reasons = {
            "value": "holds labels [7.0]: expected whole numbers 0..3",
            "shape": "expected the image's shape",
            "junk": "is not a NIfTI file",
        }
        for kind, reason in reasons.items():
            file = wrong_label(kind, Path(patients[0]["label"]), tmp_path)
            query = {"image": names[0], "tag": "final"}
            status, said = client.refusal("PUT", "/datastore/label", "label", file, **query)
            assert (status, reason in said, f"the label of {names[0]}" in said) == (422, True, True), f"{kind}: {said}"
        assert not any((studies / "labels/final").glob("*"))
        label = Path(patients[0]["label"])
        assert client.refusal("PUT", "/datastore/label", "label", label, image="nobody")[0] == 404
        for name, case in zip(names, patients, strict=True):
            client.send("PUT", "/datastore/label", "label", Path(case["label"]), image=name, tag="final")
        bad = studies / f"labels/final/{names[1]}.nii.gz"  # as by a hand that copies files
        bad.write_bytes(wrong_label("value", Path(patients[1]["label"]), tmp_path).read_bytes())
        answer = client.post("/train/linearhead_acdc", SMALL | {"val_split": 0.0}, run_sync="true")
        assert answer["left_out"].keys() == {bad.name}
        assert "holds labels [7.0]" in answer["left_out"][bad.name]
        client.post("/train/linearhead_acdc", SMALL | {"val_split": 0.0})
        assert json.loads(client.ask("GET", "/train/"))["left_out"] == answer["left_out"]


@pytest.mark.slow
def test_term_ends_the_server_and_a_training_in_the_background(label_python, patients, tmp_path):
    studies = tmp_path / "studies"
    studies.mkdir()
    image, label = Path(patients[0]["image"]), Path(patients[0]["label"])
    (studies / image.name).write_bytes(image.read_bytes())
    with served(label_python, tmp_path, studies, "--bundle", "linearhead_acdc") as client:
        client.send("PUT", "/datastore/label", "label", label, image=image.name.removesuffix(".nii.gz"), tag="final")
        client.post("/train/linearhead_acdc", {"max_epochs": 10_000, "val_split": 0.0})
        for _ in range(60):
            time.sleep(1)
            if json.loads(client.ask("GET", "/train/"))["status"] == "RUNNING":
                break
        assert json.loads(client.ask("GET", "/train/"))["status"] == "RUNNING"
    assert "Application shutdown complete" in (tmp_path / "log.txt").read_text()  # `served` has found no process left
