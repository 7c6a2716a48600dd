"""MONAI Label's server with the three bundles, as the README starts it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image
from test_own_data import decathlon, plain, trained

from adapt.new import new_bundle
from components.data.acdc import list_patients
from components.phantom.dataset import write_phantom_dataset
from release.bundles import COMPLETE
from serving.app import assemble_app

LABELS = {"rv": 1, "myo": 2, "lv": 3}
SMALL = {"max_epochs": 1, "train#trainer#prepare_batch#pool_size": 4}


def test_serving_without_monai_label_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.app.sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"pip install -c constraints-label\.txt -e '\.\[label\]'"):
        assemble_app(tmp_path / "app")
    with pytest.raises(ValueError, match="no bundle acdc to serve: expected some of autosam_acdc"):
        assemble_app(tmp_path / "app", ["acdc"])
    assert not (tmp_path / "app").exists()


def test_app_is_assembled_once_and_keeps_what_bundles_learn(tmp_path, monkeypatch):
    sample = tmp_path / "data/monailabel/sample-apps/monaibundle"
    sample.mkdir(parents=True)
    (sample / "main.py").write_text("app")
    monkeypatch.setattr("serving.app.sysconfig.get_path", lambda _: str(tmp_path / "data"))
    app, _ = assemble_app(tmp_path / "app", ["linearhead_acdc"])
    model = app / "model/linearhead_acdc/models/model.pt"
    model.write_bytes(b"learned")
    assemble_app(app, ["linearhead_acdc", "cnnhead_acdc"])
    assert model.read_bytes() == b"learned"
    assert {path.name for path in (app / "model").iterdir()} == {"linearhead_acdc", "cnnhead_acdc"}
    assert "torchvision" in (app / "sitecustomize.py").read_text()


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """The Python of an environment with MONAI Label: LABEL_PYTHON, or one set up as the README says."""
    if "LABEL_PYTHON" in os.environ:
        return os.environ["LABEL_PYTHON"]
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    command = [str(folder / "bin/pip"), "install", "--quiet", "-c", "constraints-label.txt", "-e", ".[label]"]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return str(folder / "bin/python")


@pytest.fixture(scope="module")
def patients(tmp_path_factory, request) -> list[dict[str, str]]:
    """The end-diastolic volume and label of three patients, real ones where they are at hand."""
    try:
        root = request.getfixturevalue("acdc_dir")
    except pytest.skip.Exception:
        root = write_phantom_dataset(str(tmp_path_factory.mktemp("data") / "phantoms"), patients=3)
    return [cases[0] for cases in list(list_patients(root).values())[:3]]


class Client:
    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json", **query) -> bytes:
        url = f"{self.address}{path}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, data=body, method=method, headers={"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.read()

    def send(self, method: str, path: str, field: str, file: Path, **query) -> bytes:
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="{field}"; filename="{file.name}"\r\n\r\n'
        body = head.encode() + file.read_bytes() + f"\r\n--{mark}--\r\n".encode()
        return self.ask(method, path, body, f"multipart/form-data; boundary={mark}", **query)

    def post(self, path: str, settings: dict, **query) -> dict:
        return json.loads(self.ask("POST", path, json.dumps(settings).encode(), **query))


@contextmanager
def served(python: str, folder: Path, studies: Path, *options: str) -> Iterator[Client]:
    """A client of a server that runs meanwhile, its app and log below a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = ("--studies", str(studies), "--app_dir", str(folder / "app"), "--port", str(port))
    client = Client(port)
    with (folder / "log.txt").open("w") as log:
        command = [python, "-m", "serving", *places, *options]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(120):
                assert process.poll() is None, (folder / "log.txt").read_text()
                try:
                    client.ask("GET", "/info/")
                    break
                except urllib.error.URLError:
                    time.sleep(1)
            yield client
        finally:
            os.killpg(process.pid, 15)
            process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(python, patients, tmp_path_factory):
    """A client of the running server, the folder of its app and that of its studies."""
    folder = tmp_path_factory.mktemp("served")
    studies = folder / "studies"
    studies.mkdir()
    for case in patients:
        (studies / Path(case["image"]).name).write_bytes(Path(case["image"]).read_bytes())
    with served(python, folder, studies) as client:
        yield client, folder / "app", studies


def read(content: bytes, path: Path) -> nib.Nifti1Image:
    path.write_bytes(content)
    return nib.load(path)


@pytest.mark.slow
def test_server_offers_the_bundles_and_their_labels(server):
    info = json.loads(server[0].ask("GET", "/info/"))
    assert info["models"].keys() == info["trainers"].keys() == COMPLETE.keys()
    assert all(model["labels"] == LABELS for model in info["models"].values())


@pytest.mark.slow
@pytest.mark.parametrize("bundle", COMPLETE)
def test_bundle_segments_learns_and_segments_anew(bundle, server, patients, tmp_path):
    client, app, studies = server
    image = Path(patients[0]["image"])
    name = image.name.removesuffix(".nii.gz")

    def segmented(file: str) -> np.ndarray:
        answer = read(client.ask("POST", f"/infer/{bundle}", image=name, output="image"), tmp_path / file)
        assert answer.shape == nib.load(image).shape
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
    client.post(f"/train/{bundle}", SMALL | {"val_split": 0.0}, run_sync="true")  # none to validate on
    assert model.read_bytes() != before
    assert not np.array_equal(segmented("second.nii.gz"), first)

    client.post(f"/batch/infer/{bundle}", {"multi_gpu": False}, images="all", run_sync="true")
    saved = {path.name for path in (studies / "labels/original").glob("*.nii.gz")}
    assert saved == {Path(case["image"]).name for case in patients}


@pytest.mark.slow
def test_training_in_the_background_finishes(server):
    client, _, _ = server
    client.post("/train/linearhead_acdc", SMALL | {"val_split": 0.4})
    for _ in range(120):
        time.sleep(1)
        if json.loads(client.ask("GET", "/train/"))["status"] not in ("SUBMITTED", "RUNNING"):
            break
    assert json.loads(client.ask("GET", "/train/"))["status"] == "DONE"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["volumes", "pictures"])
def test_a_bundle_for_ones_own_data_segments_learns_and_segments_anew(kind, python, tmp_path):
    data = decathlon(tmp_path / "data") if kind == "volumes" else plain(tmp_path / "data", mode="L")
    bundle = trained(new_bundle("organ", data, tmp_path)[0])
    cases = json.loads((bundle / "configs/data.json").read_text())["training"][:2]
    studies = tmp_path / "studies"
    studies.mkdir()
    for case in cases:
        (studies / Path(case["image"]).name).write_bytes((data / case["image"]).read_bytes())
    image = studies / Path(cases[0]["image"]).name
    with served(python, tmp_path, studies, "--bundle", str(bundle)) as client:

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
