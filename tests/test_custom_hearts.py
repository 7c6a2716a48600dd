"""Hearts of one's own: ACDC's layout, RV, Myo and LV in another one, and what training then starts from."""

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from test_custom_data import SHORT_EPOCHS, described, scores
from test_custom_networks import assert_complete, assert_workflows_are_whole, labels, parsed, run

from adapt.new import new_bundle
from adapt.template import networks
from components.base.volume_metadata import case_name
from components.data.acdc import list_patients
from components.data.cases import list_cases
from components.data.custom_data import read_data
from components.phantom.dataset import write_phantom_dataset
from components.pretrained import pretrained_file

pytestmark = pytest.mark.usefixtures("one_thread")

SEEN = "RV, Myo and LV: training starts from weights learned on heart phantoms, and mixes phantoms in"
VALUES = {"RV": 3, "Myo": 2, "LV": 1}  # in a layout of another order than ACDC's


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """Seven patients in ACDC's layout: five train, one validates, one tests."""
    return Path(write_phantom_dataset(str(tmp_path_factory.mktemp("acdc") / "acdc"), patients=7, size_hw_d=(64, 48, 3)))


def in_another_layout(release: Path, root: Path, names: dict[str, str] | None = None) -> Path:
    """The same hearts in the layout of the Medical Segmentation Decathlon, with labels 1 LV, 2 Myo, 3 RV."""
    items = []
    for patient, frames in list_patients(str(release)).items():
        for frame in frames:
            name = Path(frame["image"]).name
            label = nib.load(frame["label"])
            values = np.array([0, *VALUES.values()], np.uint8)[np.asarray(label.dataobj).astype(int)]
            for folder in ("imagesTr", "labelsTr"):
                (root / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(frame["image"], root / "imagesTr" / name)
            nib.save(nib.Nifti1Image(values, label.affine), root / "labelsTr" / name)
            items.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}", "group": patient})
    names = names or {name: name for name in VALUES}
    listed = {"0": "background", **{str(value): names[name] for name, value in VALUES.items()}}
    described = {"modality": {"0": "MRI"}, "labels": listed, "training": items, "validation": [], "test": []}
    (root / "dataset.json").write_text(json.dumps(described))
    return root


@pytest.mark.parametrize("network", networks())
def test_patients_in_acdcs_layout_make_a_bundle_of_every_network_that_starts_from_what_phantoms_taught(
    release, tmp_path, metadata_schema, network
):
    bundle, said = new_bundle("hearts", release, tmp_path, network=network)
    assert {"14 labelled cases in the layout ACDC: 14 training, 0 validation, 0 test", SEEN} <= set(said)
    assert_complete(bundle, metadata_schema)
    assert_workflows_are_whole(bundle, is_silent=True)
    assert (bundle / "configs/function.json").is_file()
    assert not (bundle / "configs/demo.json").exists()
    parser = parsed(bundle, "train", labelled_cases=1)
    names = {
        "autosam": "vit_head.pt",
        **{f"{name}head": f"{name}_head.pt" for name in ("cnn", "deeplab", "linear")},
        "unet": "unet.pt",
    }
    assert parser.get_parsed_content("start_checkpoint") == pretrained_file(names[network])
    start = torch.load(pretrained_file(names[network]), weights_only=True)
    state = parser.get_parsed_content("network_def").state_dict()
    trained = [key for key in start if key.startswith(("head.", "unet."))]
    assert trained
    assert all(torch.equal(state[key], start[key].float()) for key in trained)
    assert parser.get_parsed_content("phantom_share") == 0.5


@pytest.mark.parametrize("network", [pytest.param("linearhead", marks=pytest.mark.slow), "unet"])
def test_hearts_in_acdcs_layout_train_evaluate_and_are_measured(release, tmp_path, network):
    bundle, _ = new_bundle("hearts", release, tmp_path, network=network)
    quick = {"labelled_cases": 1, "epochs": 1, "train#prepare_batch#pool_size": 4, "is_silent": True}
    quick |= SHORT_EPOCHS
    run("training", bundle, "train", **quick)
    run("evaluating", bundle, "train", "evaluate", is_silent=True)
    data = read_data(bundle / "configs/data.json")
    tested = list_cases(data, "test")
    assert {row["case"] for row in scores(bundle / "eval")} == {case_name(case["image"]) for case in tested}
    assert {case["image"].split("_frame")[0] for case in tested} == {tested[0]["image"].split("_frame")[0]}
    image = tested[0]["image"]
    run("measuring", bundle, "inference", "function", dataset_dir=image, output_dir=str(tmp_path / "out"))
    assert np.array_equal(labels(tmp_path / "out", image), labels(bundle / "eval", image))
    with (tmp_path / "out/function.csv").open() as file:
        assert [row["case"] for row in csv.DictReader(file)] == [
            tested[0]["image"].rpartition("/")[2].partition("_frame")[0]
        ]


@pytest.mark.parametrize("names", [None, {"RV": "rv", "Myo": "MYO", "LV": "Lv"}], ids=["as ACDC's", "in other letters"])
def test_hearts_in_another_layout_and_order_are_hearts(release, tmp_path, names):
    bundle, said = new_bundle("hearts", in_another_layout(release, tmp_path / "data", names), tmp_path)
    values = described(bundle)
    assert (values["class_names"], values["label_values"]) == (["RV", "Myo", "LV"], [0, 3, 2, 1])
    assert {SEEN, "classes: RV (3), Myo (2), LV (1)", "labels in the files: 0 -> 0, 3 -> 1, 2 -> 2, 1 -> 3"} <= set(
        said
    )
    parser = parsed(bundle, "train", labelled_cases=1)
    assert parser.get_parsed_content("start_checkpoint") == pretrained_file("unet.pt")
    (frame, *_) = parser.get_parsed_content("train#dataset#data")
    name = case_name(frame["image"])
    truth = list_patients(str(release))[name.split("_frame")[0]]
    (label,) = (each["label"] for each in truth if case_name(each["image"]) == name)
    loaded = parser.get_parsed_content("load")(frame)["label"][0]
    assert np.array_equal(loaded, np.asarray(nib.load(label).dataobj))


def test_two_classes_of_a_heart_or_its_pictures_are_no_hearts(release, tmp_path):
    folder = in_another_layout(release, tmp_path / "data", {"RV": "RV", "Myo": "Myo", "LV": "cavity"})
    bundle, said = new_bundle("organ", folder, tmp_path)
    assert SEEN not in said
    assert parsed(bundle, "train").get_parsed_content("start_checkpoint") is None
    assert "phantom_share" not in json.loads((bundle / "configs/train.json").read_text())


def test_folders_like_acdcs_with_names_of_ones_own_are_patients(release, tmp_path):
    for number, patient in enumerate(sorted((release / "training").iterdir())):
        folder = tmp_path / f"data/clinic-{number:02d}"
        folder.mkdir(parents=True)
        for path in patient.iterdir():
            shutil.copy(path, folder / path.name.replace(patient.name, folder.name))
    (tmp_path / "data/notes").mkdir()
    named = [f"clinic-{number:02d}" for number in range(7)]
    assert list(list_patients(str(tmp_path / "data"))) == named
    bundle, said = new_bundle("hearts", tmp_path / "data", tmp_path)
    assert SEEN in said
    groups = [case["group"] for case in described(bundle)["training"]]
    assert groups == [name for name in named for _ in ("ED", "ES")]
    subsets = [list_cases(read_data(bundle / "configs/data.json"), name) for name in ("training", "validation", "test")]
    assert [len(cases) for cases in subsets] == [10, 2, 2]
