"""DICOM through MONAI Label: an MR series in Orthanc, served, segmented as DICOM SEG, labelled and trained on."""

import gzip
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from label_server import served

from components.data.acdc import list_patients
from components.phantom.dataset import write_phantom_dataset

NAMES = [{"name": name, "description": name} for name in ("RV", "Myo", "LV")]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def orthanc(tmp_path) -> Iterator[str]:
    """The address of an Orthanc that runs meanwhile, with DICOMweb and without a login."""
    program, plugin = shutil.which("Orthanc"), Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
    if program is None or not plugin.is_file():
        pytest.skip("no Orthanc with DICOMweb at hand: apt-get install orthanc orthanc-dicomweb")
    port, folder = free_port(), tmp_path / "orthanc"
    settings = {
        "HttpPort": port,
        "DicomPort": free_port(),
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "AuthenticationEnabled": False,
        "Plugins": [str(plugin)],
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))
    with (tmp_path / "orthanc.txt").open("w") as log:
        process = subprocess.Popen([program, str(tmp_path / "orthanc.json")], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(60):
            assert process.poll() is None, (tmp_path / "orthanc.txt").read_text()
            try:
                urllib.request.urlopen(f"{address}/system").close()
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def write_series(orthanc: str, folder: Path, **phantom) -> dict[str, str]:
    """Store a synthetic patient as an MR series, and return the files of its image and label."""
    from test_dicom import write_classic

    root = write_phantom_dataset(str(folder / "phantoms"), patients=1, **phantom)
    case = next(iter(list_patients(root).values()))[0]
    volume = nib.load(case["image"])
    frame = nib.Nifti1Image(np.asarray(volume.dataobj)[..., None].astype(np.int16), volume.affine)
    write_classic(folder / "series", frame, one_series=True, trigger=None)
    for file in sorted((folder / "series").iterdir()):
        urllib.request.urlopen(urllib.request.Request(f"{orthanc}/instances", file.read_bytes())).close()
    return case


def series_of(orthanc: str, modality: str) -> list[str]:
    with urllib.request.urlopen(f"{orthanc}/dicom-web/series?Modality={modality}") as answer:
        return [series["0020000E"]["Value"][0] for series in json.loads(answer.read() or "[]")]


def study_of(orthanc: str) -> str:
    with urllib.request.urlopen(f"{orthanc}/dicom-web/studies") as answer:
        (study,) = json.loads(answer.read())
    return study["0020000D"]["Value"][0]


def segments_of(seg: pydicom.Dataset) -> list[str]:
    return [segment.SegmentLabel for segment in seg.SegmentSequence]


@pytest.mark.slow
def test_mr_series_in_orthanc_is_segmented_labelled_and_trained_on(orthanc, label_python, tmp_path):
    volume = nib.load(write_series(orthanc, tmp_path, size_hw_d=(96, 96, 6))["image"])
    (series,) = series_of(orthanc, "MR")

    cache = {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(tmp_path / "cache")}
    with served(label_python, tmp_path, f"{orthanc}/dicom-web", "--bundle", "linearhead_acdc", **cache) as client:
        assert json.loads(client.ask("POST", "/activelearning/first", b"{}"))["id"] == series
        assert client.refusal("POST", "/infer/linearhead_acdc", image="1.2.3", output="image")[0] == 404
        for name in ("../../etc", f"{series}/..", "/etc/passwd", "1" * 65):
            assert client.refusal("POST", "/infer/linearhead_acdc", image=name, output="image")[0] == 404
        assert json.loads(gzip.decompress(client.ask("GET", "/proxy/dicom/qido/studies")))  # as OHIF asks
        assert json.loads(gzip.decompress(client.ask("GET", f"/proxy/dicom/wado/studies/{study_of(orthanc)}/metadata")))
        for path in ("../system", "..%2fsystem", "%2e%2e/system", "system", "studies/..%2f..%2fsystem"):
            assert client.refusal("GET", f"/proxy/dicom/qido/{path}")[0] in (404, 422)
        assert client.refusal("PUT", "/datastore/", "file", tmp_path / "phantoms/phantom.json", image="x")[0] == 422

        (tmp_path / "pred.nii.gz").write_bytes(
            client.ask("POST", "/infer/linearhead_acdc", image=series, output="image")
        )
        pred = np.asarray(nib.load(tmp_path / "pred.nii.gz").dataobj)
        assert pred.shape == volume.shape
        assert np.unique(pred).tolist() == [0, 1, 2, 3]

        seg = client.form("/infer/linearhead_acdc", {"label_info": NAMES}, image=series, output="dicom_seg")
        (tmp_path / "seg.dcm").write_bytes(seg)
        written = pydicom.dcmread(tmp_path / "seg.dcm")
        assert written.Modality == "SEG"
        assert segments_of(written) == ["RV", "Myo", "LV"]
        assert written.ReferencedSeriesSequence[0].SeriesInstanceUID == series
        assert written.pixel_array.sum() == (pred > 0).sum()

        assert series_of(orthanc, "SEG") == []
        client.send("PUT", "/datastore/label", "label", tmp_path / "pred.nii.gz", image=series, tag="final")
        (stored,) = series_of(orthanc, "SEG")
        model = tmp_path / "app/model/linearhead_acdc/models/model.pt"
        before = model.read_bytes()
        settings = {"max_epochs": 1, "val_split": 0.0}
        assert client.post("/train/linearhead_acdc", settings, run_sync="true")["left_out"] == {}
        assert model.read_bytes() != before
        (submitted,) = (tmp_path / "cache").rglob(f"{stored}/*.dcm")  # which the training has fetched
        assert segments_of(pydicom.dcmread(submitted)) == ["rv", "myo", "lv"]


@pytest.mark.slow
def test_a_series_is_fetched_while_files_of_the_cache_change(orthanc, label_python, tmp_path):
    write_series(orthanc, tmp_path, size_hw_d=(96, 96, 6))
    (series,) = series_of(orthanc, "MR")
    cache, ended = tmp_path / "cache", threading.Event()

    def change() -> None:
        (folder,) = cache.iterdir()
        while not ended.is_set():
            (folder / "other.nii.gz").touch()
            (folder / "other.nii.gz").unlink()

    options = {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(cache)}
    with (
        served(label_python, tmp_path, f"{orthanc}/dicom-web", "--bundle", "linearhead_acdc", **options) as client,
        ThreadPoolExecutor() as pool,
    ):
        changing = pool.submit(change)
        try:
            client.ask("POST", "/infer/linearhead_acdc", seconds=60, image=series, output="json")
        finally:
            ended.set()
        changing.result()
