"""One's own data: what a folder of labelled images becomes, and what is refused."""

import csv
import json
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, messages_of, run_monai_bundle, run_monai_bundle_here, succeeds
from monai.bundle import (
    ConfigParser,
    create_workflow,
    verify_metadata,
    verify_net_in_out,
)
from monai.transforms import RandGaussianNoised
from PIL import Image

from adapt.new import new_bundle
from components.data.cases import list_cases, list_unlabelled
from components.data.custom_data import DatasetStatistics, read_data
from components.data.pictures import PictureReader
from components.data.planes import with_neighbours
from components.data.slices import SliceDataset
from components.data.transforms import CentralCropd, LoadVolumed
from release.__main__ import build
from serving.app import assemble_app

NUCLEI = REPOSITORY.parent / "shared/data/nuclei"
HIPPOCAMPUS = REPOSITORY.parent / "shared/data/hippocampus"
BOTH = "['configs/train.json','configs/evaluate.json']"
SHORT_EPOCHS = {"train#dataset#at_least": 1}  # else slices are repeated until an epoch has 25 steps


def write_volume(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return str(path)


def organ(number: int, side: int = 20, depth: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A bright block with a brighter one on it, in noise, off the middle; labels 1 and 2."""
    noise = np.random.RandomState(number)
    label = np.zeros((side, side + 4, depth), np.uint8)
    start = 4 + number % 3
    label[start : start + 4, 10:14] = 1
    label[start : start + 4, 14:18] = 2
    return (noise.rand(*label.shape) * 20 + 60 * label).astype(np.float32), label


def decathlon(root: Path, cases: int = 8, *, real: bool = HIPPOCAMPUS.is_dir(), **described) -> Path:
    """A folder in the layout of the Medical Segmentation Decathlon: a few real cases where they are at hand."""
    listed = json.loads((HIPPOCAMPUS / "dataset.json").read_text())["training"] if real else []
    items = []
    for number in range(cases):
        item = {"image": f"./imagesTr/case_{number}.nii.gz", "label": f"./labelsTr/case_{number}.nii.gz"}
        for role, array in zip(("image", "label"), organ(number), strict=True):
            (root / item[role]).parent.mkdir(parents=True, exist_ok=True)
            if real:
                shutil.copy(HIPPOCAMPUS / listed[number][role], root / item[role])
            else:
                write_volume(root / item[role], array)
        items.append(item)
    description = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": items,
        "validation": [],
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps(description | described))
    return root


def plain(root: Path, cases: int = 8, mode: str = "RGB", side: int = 40) -> Path:
    """Folders images and masks of pictures, masks of 0 and 255."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(cases):
        noise = np.random.RandomState(number)
        mask = np.zeros((side, side + 10), np.uint8)
        mask[5 : 12 + number, 20:30] = 255
        grey = Image.fromarray((noise.rand(*mask.shape) * 50 + mask * 0.7).astype(np.uint8))
        deep = Image.fromarray((np.asarray(grey) * 200).astype(np.uint16)) if mode == "I;16" else grey.convert(mode)
        deep.save(root / f"images/cell_{number}.png")
        Image.fromarray(mask).save(root / f"masks/cell_{number}.png")
    return root


def same_names(root: Path, cases: int = 8) -> Path:
    """A folder for each patient with an image of one name, images/p00/t2.nii.gz and labels/p00/t2.nii.gz."""
    for number in range(cases):
        for folder, array in zip(("images", "labels"), organ(number), strict=True):
            write_volume(root / folder / f"p{number:02d}/t2.nii.gz", array)
    return root


def ct_phantom(root: Path, cases: int = 8, side: int = 64, depth: int = 6) -> Path:
    """Plain folders of CT-like volumes in HU: a body of fat in air, a spine, and labels 1 liver, 2 cyst in it."""
    rows, columns, slices = np.mgrid[:side, :side, :depth].astype(np.float32)
    for number in range(cases):
        noise = np.random.RandomState(number)

        def ball(row, column, height, width, tall=1.0):
            shift = noise.uniform(-0.04, 0.04, 3)  # noqa: B023 - called within the turn of the loop
            return (
                ((rows / side - row - shift[0]) / height) ** 2
                + ((columns / side - column - shift[1]) / width) ** 2
                + ((slices / depth - 0.5 - shift[2]) / tall) ** 2
            ) < 1

        body, spine, liver = (
            ball(0.5, 0.5, 0.4, 0.46, 9.0),
            ball(0.78, 0.5, 0.06, 0.06, 9.0),
            ball(0.42, 0.34, 0.2, 0.2),
        )
        cyst = ball(0.42, 0.34, 0.08, 0.08, 0.4) & liver
        image = np.select([~body, spine, cyst, liver], [-1000, 700, 10, 110], -80) + noise.normal(0, 25, body.shape)
        write_volume(root / f"images/patient_{number}.nii.gz", image.astype(np.int16), np.diag([3, 3, 5, 1.0]))
        write_volume(root / f"labels/patient_{number}.nii.gz", (liver + cyst.astype(np.uint8)), np.diag([3, 3, 5, 1.0]))
    return root


def described(bundle: Path) -> dict:
    return json.loads((bundle / "configs/data.json").read_text())


def scores(output: Path) -> list[dict[str, str]]:
    with (output / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", ["volumes", "pictures"])
def test_a_folder_becomes_a_bundle_that_trains_evaluates_and_infers(tmp_path, kind):
    data = decathlon(tmp_path / "data") if kind == "volumes" else plain(tmp_path / "data")
    bundle, _ = new_bundle("my_organ", data, tmp_path / "bundles")
    quick = ("--steps", "2", "--val_interval", "100", "--train#dataset#at_least", "1")
    run = ("--config_file", "configs/train.json", "--labelled_cases", "1", *quick)
    run_monai_bundle_here("run", "training", *run, cwd=bundle)
    run_monai_bundle_here("run", "evaluating", "--config_file", BOTH, cwd=bundle)
    cases = {row["case"] for row in scores(bundle / "eval")}
    tested = list_cases(read_data(bundle / "configs/data.json", str(data)), "test")
    assert cases == {Path(case["image"]).name.split(".")[0] for case in tested}
    inferred = run_monai_bundle_here("run", "inferring", "--config_file", "configs/inference.json", cwd=bundle)
    assert "taken for granted" not in inferred
    for case in described(bundle)["training"]:
        image = data / case["image"]
        name = image.name.split(".")[0]
        if kind == "volumes":
            pred = nib.load(bundle / f"eval/{name}_pred.nii.gz")
            assert pred.shape == nib.load(image).shape
            assert np.array_equal(pred.affine, nib.load(image).affine)
        else:
            pred = Image.open(bundle / f"eval/{name}_pred.png")
            assert (pred.mode, pred.size) == ("P", Image.open(image).size)
            assert set(np.unique(np.asarray(pred))) <= {0, 1}


def test_files_of_one_name_are_told_apart_by_their_folders_in_all_results(tmp_path):
    data = same_names(tmp_path / "data", cases=14)
    bundle, _ = new_bundle("organ", data, tmp_path)
    tested = [Path(case["image"]).parent.name for case in list_cases(read_data(bundle / "configs/data.json"), "test")]
    assert len(tested) > 1
    options = {"width": 2, "steps": 1, "val_interval": 100, "is_silent": True, "bundle_root": str(bundle)}
    train, evaluate = (str(bundle / f"configs/{name}.json") for name in ("train", "evaluate"))
    monai.bundle.run("training", config_file=train, labelled_cases=2, logging_file=False, **options)
    monai.bundle.run("evaluating", config_file=[train, evaluate], logging_file=False, **options)
    assert {row["case"] for row in scores(bundle / "eval")} == {f"{name}_t2" for name in tested}
    for end in ("pred.nii.gz", "overlay.png"):
        assert {path.name for path in (bundle / "eval").glob(f"*_{end}")} == {f"{name}_t2_{end}" for name in tested}


def trained(bundle: Path) -> Path:
    """Give a bundle a model with random weights that says all that a training writes."""
    parser = ConfigParser()
    parser.read_config(bundle / "configs/train.json")
    parser.update({"bundle_root": str(bundle), "labelled_cases": 1, "width": 4, "start_checkpoint": None})
    (bundle / "models").mkdir()
    torch.save(parser.get_parsed_content("network_def").state_dict(), bundle / "models/model.pt")
    return bundle


def test_a_trained_bundle_becomes_an_archive_that_segments_elsewhere(tmp_path, metadata_schema):
    data = decathlon(tmp_path / "data")
    bundle = trained(new_bundle("organ", data, tmp_path)[0])
    (bundle / "configs/.ipynb_checkpoints").mkdir()
    for dist in ("dist", "again"):
        build(str(tmp_path / dist), bundle=str(bundle))
    assert {path.name for path in (tmp_path / "dist").iterdir()} == {"organ_v0.1.0.zip", "model_info.json"}
    assert len({(tmp_path / dist / "organ_v0.1.0.zip").read_bytes() for dist in ("dist", "again")}) == 1
    with zipfile.ZipFile(tmp_path / "dist/organ_v0.1.0.zip") as file:
        file.extractall(tmp_path / "elsewhere")
    root = tmp_path / "elsewhere/organ"
    meta, config = (str(root / f"configs/{name}.json") for name in ("metadata", "inference"))
    verify_metadata(meta_file=meta, filepath=metadata_schema, create_dir=False)
    verify_net_in_out("network_def", meta, config, bundle_root=str(root))
    for kind, name in (("infer", "inference"), ("train", "train")):
        file = str(root / f"configs/{name}.json")
        workflow = create_workflow(
            config_file=file, workflow_type=kind, bundle_root=str(root), dataset_dir=str(data), labelled_cases=1
        )
        assert workflow.check_properties() == []
    assert not list(root.glob("configs/.*"))
    assert (root / "models/model.pt").read_bytes() == (bundle / "models/model.pt").read_bytes()
    assert (root / "components/data/custom_data.py").is_file()
    assert described(root) == described(bundle) | {"dataset_dir": ""}
    with pytest.raises(
        ValueError, match=r"dataset_dir is not set: expected the folder of the data.*give --dataset_dir PATH"
    ):
        list_cases(read_data(root / "configs/data.json", ""), "training")
    image = data / described(bundle)["training"][0]["image"]
    infer = ("run", "inferring", "--config_file", "configs/inference.json", "--dataset_dir", str(image))
    succeeds(run_monai_bundle(*infer, cwd=root))
    assert nib.load(root / "eval/case_0_pred.nii.gz").shape == nib.load(image).shape


def test_what_is_not_trained_or_is_to_have_another_encoder_is_not_packed(tmp_path):
    bundle, _ = new_bundle("cells", plain(tmp_path / "data", side=20), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model .*cells/models/model\.pt: run training in .*cells first"):
        build(str(tmp_path / "dist"), bundle=str(bundle))
    with pytest.raises(ValueError, match="expected no model_type; make another bundle with autosam new"):
        build(str(tmp_path / "dist"), bundle=str(bundle), model_type="vit_b")
    assert not (tmp_path / "dist").exists()


def test_monai_labels_app_trains_on_from_the_model_with_indices_as_labels(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.app.importlib.util.find_spec", lambda name: name)
    bundle = trained(new_bundle("cells", plain(tmp_path / "data", side=20), tmp_path)[0])
    app, names = assemble_app(tmp_path / "app", [str(bundle)])
    assert names == ["cells"]
    root = app / "model/cells"
    assert described(root)["label_values"] == [0, 1]
    parser = ConfigParser()
    parser.read_config(root / "configs/train.json")
    label = tmp_path / "label.png"
    Image.new("L", (400, 400), 1).save(label)  # would change the crop
    submitted = [{"image": "no such file", "label": str(label)}]
    parser.update({"bundle_root": str(root), "train#dataset#data": submitted})
    start, network = (torch.load(bundle / "models/model.pt"), parser.get_parsed_content("network_def").state_dict())
    assert all(torch.equal(start[name], network[name]) for name in start)
    with pytest.raises(ValueError, match="expected bundles of different names, received cells, cells: rename"):
        assemble_app(tmp_path / "other", [str(bundle), str(bundle)])
    bundle.rename(tmp_path / "cell_detection")
    with pytest.raises(ValueError, match="MONAI Label would use cell_detection for detection by its name: rename"):
        assemble_app(tmp_path / "other", [str(tmp_path / "cell_detection")])


def test_inference_refuses_what_contradicts_the_training(tmp_path):
    bundle, _ = new_bundle("cells", plain(tmp_path / "data", side=20), tmp_path)
    quick = ("--steps", "1", "--labelled_cases", "1", "--width", "4", "--start_checkpoint", "$None")
    quick = (*quick, "--test_time_views", "1", "--train#dataset#at_least", "1")
    run_monai_bundle_here("run", "training", "--config_file", "configs/train.json", *quick, cwd=bundle)
    infer = ("run", "inferring", "--config_file", "configs/inference.json")
    with pytest.raises(Exception) as caught:  # MONAI wraps a component's error in one of its own
        run_monai_bundle_here(*infer, "--crop_size", "32", cwd=bundle)
    assert "it was trained with crop_size 64, received 32" in messages_of(caught.value)


def test_classes_with_sides_are_neither_mirrored_nor_turned(tmp_path):
    bundle, said = new_bundle("sided", decathlon(tmp_path / "data"), tmp_path)
    assert described(bundle)["turned_views"] is False
    assert any("Anterior, Posterior name sides" in sentence for sentence in said)
    other, _ = new_bundle(
        "other", decathlon(tmp_path / "more", labels={"head": 1, "body": 2, "background": 0}), tmp_path
    )
    assert described(other)["turned_views"] is True
    assert described(other)["class_names"] == ["head", "body"]


def test_more_views_than_the_training_showed_are_refused(tmp_path):
    bundle, _ = new_bundle("sided", decathlon(tmp_path / "data"), tmp_path)
    train = ("run", "training", "--config_file", "configs/train.json")
    with pytest.raises(Exception) as caught:  # MONAI wraps a component's error in one of its own
        run_monai_bundle_here(*train, "--test_time_views", "8", cwd=bundle)
    assert "expected test_time_views of at most 1" in messages_of(caught.value)


def test_without_a_test_list_of_its_own_a_validation_list_is_no_test(tmp_path):
    folder = decathlon(tmp_path / "data")
    listed = json.loads((folder / "dataset.json").read_text())
    listed |= {"validation": listed["training"][:2], "training": listed["training"][2:]}
    (folder / "dataset.json").write_text(json.dumps(listed))
    bundle, said = new_bundle("organ", folder, tmp_path)
    assert "there is no test list: training works, evaluation stops with an error" in said
    with pytest.raises(ValueError, match=r"no labelled cases to test on in .*: expected a list `test` with labels"):
        list_cases(read_data(bundle / "configs/data.json", str(folder)), "test")
    assert len(list_cases(read_data(bundle / "configs/data.json", str(folder)), "validation")) == 2


def test_images_without_labels_in_the_test_list_are_not_scored(tmp_path):
    folder = decathlon(tmp_path / "data", test=["./imagesTs/case_9.nii.gz"])
    bundle, _ = new_bundle("organ", folder, tmp_path)
    assert described(bundle)["test"] == []
    assert len(list_cases(read_data(bundle / "configs/data.json", str(folder)), "test")) == 1


def test_cases_of_a_group_stay_together_and_count_as_one(tmp_path):
    folder = decathlon(tmp_path / "data")
    listed = json.loads((folder / "dataset.json").read_text())
    for number, item in enumerate(listed["training"]):
        item["group"] = f"patient {number // 2}"
    (folder / "dataset.json").write_text(json.dumps(listed))
    bundle, _ = new_bundle("organ", folder, tmp_path)
    file = bundle / "configs/data.json"
    subsets = [list_cases(read_data(file, str(folder)), subset) for subset in ("training", "validation", "test")]
    numbers = [{int(case["image"][-8]) // 2 for case in cases} for cases in subsets]
    assert [len(cases) for cases in subsets] == [4, 2, 2]
    assert not numbers[0] & numbers[1] | numbers[0] & numbers[2] | numbers[1] & numbers[2]
    assert len(list_cases(read_data(file, str(folder)), "training", labelled_cases=1)) == 2
    with pytest.raises(ValueError, match="labelled_cases must be between 0 and 2"):
        list_cases(read_data(file, str(folder)), "training", labelled_cases=3)


def unlabelled_of(bundle: Path, folder: Path, labelled_cases: int, **options) -> list[str]:
    file = bundle / "configs/data.json"
    labelled = list_cases(read_data(file, str(folder)), "training", labelled_cases=labelled_cases)
    cases = list_unlabelled(read_data(file, str(folder)), labelled=labelled, **options)
    assert all(case.keys() == {"image"} for case in cases)
    return [Path(case["image"]).name for case in cases]


def test_cases_that_are_not_labelled_or_listed_as_unlabelled_can_be_learned_from(tmp_path):
    folder = decathlon(tmp_path / "data", unlabelled=["./more/case_9.nii.gz"])
    write_volume(folder / "more/case_9.nii.gz", organ(9)[0])
    bundle, _ = new_bundle("organ", folder, tmp_path)
    data = described(bundle)
    assert data["unlabelled"] == [{"image": "more/case_9.nii.gz"}]
    names = unlabelled_of(bundle, folder, labelled_cases=2)
    training = list_cases(read_data(bundle / "configs/data.json", str(folder)), "training")
    assert names == [*(Path(case["image"]).name for case in training[2:]), "case_9.nii.gz"]
    assert unlabelled_of(bundle, folder, labelled_cases=6) == ["case_9.nii.gz"]
    with pytest.raises(ValueError, match=r"unlabelled_cases must be between 1 and 5, .* received 6"):
        unlabelled_of(bundle, folder, labelled_cases=2, cases=6)
    (folder / "more/case_9.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"the listed image .*case_9.nii.gz is missing: add it"):
        unlabelled_of(bundle, folder, labelled_cases=6)


def test_an_image_to_learn_from_that_is_also_scored_is_refused(tmp_path):
    folder = decathlon(tmp_path / "data", unlabelled=["./imagesTr/case_0.nii.gz"])
    with pytest.raises(ValueError, match=r"case_0.nii.gz is in the lists `training` and `unlabelled`"):
        new_bundle("organ", folder, tmp_path)


@pytest.mark.parametrize("make", [decathlon, plain])
def test_training_goes_on_with_what_the_network_says_of_cases_without_labels(tmp_path, make):
    bundle, _ = new_bundle("organ", make(tmp_path / "data"), tmp_path)
    options = {"labelled_cases": 1, "width": 2, "steps": 1, "val_interval": 1, "is_silent": True, "canvas_size": 64}
    options |= {"bundle_root": str(bundle), "output_dir": str(tmp_path / "eval"), "crop_size": 64}
    options |= {"start_checkpoint": "$None", **SHORT_EPOCHS}
    train = str(bundle / "configs/train.json")
    monai.bundle.run("training", config_file=train, logging_file=False, **options)
    options |= {"start_checkpoint": str(bundle / "models/model.pt"), "ckpt_dir": str(tmp_path / "models")}
    overlay = [train, str(bundle / "configs/unlabelled.json")]
    monai.bundle.run("training", config_file=overlay, logging_file=False, unlabelled_cases=2, **options)
    assert (tmp_path / "models/model.pt").is_file()


def test_nnunets_raw_folder_is_read(tmp_path):
    folder = decathlon(
        tmp_path / "data", training=[], channel_names={"0": "MRI"}, labels={"background": 0, "A": 1, "B": 2}
    )
    for image in (folder / "imagesTr").iterdir():
        image.rename(image.with_name(image.name.replace(".nii", "_0000.nii")))
    bundle, _ = new_bundle("organ", folder, tmp_path)
    assert described(bundle)["class_names"] == ["A", "B"]
    assert described(bundle)["training"][0] == {
        "image": "imagesTr/case_0_0000.nii.gz",
        "label": "labelsTr/case_0.nii.gz",
    }
    shutil.copy(folder / "imagesTr/case_0_0000.nii.gz", folder / "imagesTr/case_0_0001.nii.gz")
    with pytest.raises(ValueError, match=r"several channels of a case, such as case_0_0001: expected _0000 alone"):
        new_bundle("again", folder, tmp_path)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("I;16", 1), ("RGB", 3), ("RGBA", 3)])
def test_pictures_of_any_kind_are_read(tmp_path, mode, channels):
    bundle, said = new_bundle("cells", plain(tmp_path / "data", cases=4, mode=mode), tmp_path)
    values = described(bundle)
    assert (values["channels"], values["pictures"], values["label_values"]) == (channels, True, [0, 255])
    assert "labels in the files: 0 -> 0, 255 -> 1" in said
    case = list_cases(read_data(bundle / "configs/data.json", str(tmp_path / "data")), "training")[0]
    loaded = LoadVolumed(["image", "label"], label_values=[0, 255], channels=channels)(case)
    assert loaded["image"].shape == (channels, 50, 40, 1)
    assert loaded["label"].unique().tolist() == [0, 1]


@pytest.mark.parametrize("suffix", [".tif", ".bmp", ".jpg"])
def test_pictures_of_any_format_are_read(tmp_path, suffix):
    folder = plain(tmp_path / "data", cases=4)
    for path in (folder / "images").iterdir():
        Image.open(path).save(path.with_suffix(suffix))
        path.unlink()
    bundle, _ = new_bundle("cells", folder, tmp_path)
    assert {Path(case["image"]).suffix for case in described(bundle)["training"]} == {suffix}


def test_webp_is_refused_with_the_formats_that_are_read(tmp_path):
    data = plain(tmp_path / "data")
    for path in (data / "images").iterdir():
        Image.open(path).save(path.with_suffix(".webp"), lossless=True)
        path.unlink()
    with pytest.raises(ValueError, match=r"\.webp is a WebP picture, which is not read: .* convert it to PNG"):
        new_bundle("cells", data, tmp_path)


def test_colours_with_transparency_beside_plain_ones_are_of_one_kind(tmp_path):
    folder = plain(tmp_path / "data", cases=4)
    Image.open(folder / "images/cell_0.png").convert("RGBA").save(folder / "images/cell_0.png")
    bundle, _ = new_bundle("cells", folder, tmp_path)
    assert described(bundle)["channels"] == 3


def test_an_indexed_prediction_is_read_as_a_label(tmp_path):
    picture = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8))
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "label.png")
    reader = PictureReader(is_label=True)
    array, _ = reader.get_data(reader.read(tmp_path / "label.png"))
    assert array[..., 0].T.tolist() == [[0, 1], [2, 0]]


def spoil(folder: Path, fault: str) -> None:
    """Make a folder of pictures or volumes wrong in one way."""
    images, labels = folder / "images", folder / "masks"
    match fault:
        case "mask without image":
            (images / "cell_0.png").unlink()
        case "image without mask":
            (labels / "cell_0.png").unlink()
        case "other size":
            Image.new("L", (9, 9)).save(labels / "cell_0.png")
        case "mixed channels":
            Image.open(images / "cell_0.png").convert("L").save(images / "cell_0.png")
        case "empty":
            for path in (*images.iterdir(), *labels.iterdir()):
                path.unlink()
        case "jpeg label":
            Image.open(labels / "cell_0.png").save(labels / "cell_0.jpg")
            (labels / "cell_0.png").unlink()
        case "coloured label":
            Image.new("RGB", (50, 40), "red").save(labels / "cell_0.png")
        case "no layout":
            shutil.rmtree(labels)
        case "one name twice":
            Image.open(images / "cell_0.png").save(images / "cell_0.bmp")
        case "nothing":
            shutil.rmtree(labels)
            shutil.rmtree(images)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("one name twice", r"cell_0.png and .*cell_0.bmp have the same name: expected one file for each case"),
        ("mask without image", r"1 files have no image, such as .*masks/cell_0.png"),
        ("image without mask", r"1 files have no label, such as .*images/cell_0.png"),
        ("other size", r"cell_0.png does not belong to its image: expected the image's shape \(50, 40, 1\)"),
        ("mixed channels", r"expected images of one kind, received grey values, such as .* and colours, such as"),
        ("empty", "images is empty: expected volumes or pictures"),
        ("jpeg label", "cell_0.jpg is a label map as JPEG, which changes labels at every border"),
        ("coloured label", "cell_0.png is a label map with colours: expected a grey value or an index"),
        ("no layout", "has no images and labels: expected a dataset.json that lists them, or folders"),
        ("nothing", "has no images and labels: expected .* with equal names in both, or labels .*; found nothing"),
    ],
)
def test_a_fault_of_a_folder_of_pictures_has_one_clear_error(tmp_path, fault, message):
    folder = plain(tmp_path / "data", cases=3)
    spoil(folder, fault)
    with pytest.raises(ValueError, match=message):
        new_bundle("cells", folder, tmp_path)
    assert not (tmp_path / "cells").exists()


def test_labels_outside_the_list_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has the value 2: expected one of those in dataset.json, \[0, 1\]"):
        new_bundle("organ", decathlon(tmp_path / "data", labels={"0": "background", "1": "A"}), tmp_path)


def test_a_class_that_no_training_case_has_is_refused(tmp_path):
    labels = {"0": "background", "1": "A", "2": "B", "3": "C"}
    with pytest.raises(ValueError, match=r"class C \(3\) is in no training case"):
        new_bundle("organ", decathlon(tmp_path / "data", labels=labels), tmp_path)


def relist(folder: Path, change) -> None:
    """Change the `dataset.json` of a folder by the one it has."""
    file = folder / "dataset.json"
    listed = json.loads(file.read_text())
    file.write_text(json.dumps(listed | change(listed["training"])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cases: {"validation": cases[:1]}, r"case_0\.nii\.gz is in the lists `training` and `validation`"),
        (lambda cases: {"training": [*cases, cases[0] | {"group": "other"}]}, "is twice in the list `training`"),
        (
            lambda cases: {
                "training": cases[:4],
                "validation": [cases[4] | {"group": "patient 4"}],
                "test": [cases[5] | {"group": "patient 4"}],
            },
            "the group patient 4 is in the lists `validation` and `test`: expected all its cases in one",
        ),
    ],
    ids=["case in two lists", "case twice in one list", "group in two lists"],
)
def test_what_would_be_learned_from_and_scored_is_refused(tmp_path, change, message):
    folder = decathlon(tmp_path / "data")
    relist(folder, change)
    with pytest.raises(ValueError, match=message):
        new_bundle("organ", folder, tmp_path)


def test_a_training_case_that_is_written_into_the_test_list_is_refused(tmp_path):
    folder = decathlon(tmp_path / "data")
    file = new_bundle("organ", folder, tmp_path)[0] / "configs/data.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"test": values["training"][:1]}))
    for subset in ("training", "test"):
        with pytest.raises(
            ValueError, match=r"case_0\.nii\.gz is in the lists `training` and `test`: expected it once"
        ):
            list_cases(read_data(file, str(folder)), subset)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"dataset\.json cannot be read: expected JSON"),
        ('{"training": [], "labels": ["background", "A"]}', r"dataset\.json has no `labels`: expected an object"),
        ('{"training": ["a.nii"], "labels": {"1": "A"}}', r"lists 'a\.nii' in `training`: expected an `image` and its"),
    ],
)
def test_a_dataset_json_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        new_bundle("organ", tmp_path, tmp_path)


def test_files_beside_the_folder_are_found_however_it_is_named(tmp_path, monkeypatch):
    folder = decathlon(tmp_path / "data/lists")
    (folder / "imagesTr").rename(tmp_path / "data/images")
    relist(folder, lambda cases: {"training": [case | {"image": f"../images/{case['image'][11:]}"} for case in cases]})
    monkeypatch.chdir(tmp_path)
    bundle, _ = new_bundle("organ", "data/lists", "bundles")
    cases = list_cases(read_data(bundle / "configs/data.json", described(bundle)["dataset_dir"]), "training")
    assert all(Path(path).is_file() for case in cases for path in case.values())


def test_a_volume_and_labels_of_another_size_are_refused(tmp_path):
    folder = decathlon(tmp_path / "data")
    write_volume(folder / "labelsTr/case_0.nii.gz", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ValueError, match=r"case_0\.nii\.gz does not belong to its image: .* received \(9, 9, 3\)"):
        new_bundle("organ", folder, tmp_path)


def test_volumes_beside_pictures_are_refused(tmp_path):
    folder = plain(tmp_path / "data", cases=2, mode="L")
    for role, array in zip(("images", "masks"), organ(0), strict=True):
        write_volume(folder / role / "volume.nii.gz", array)
    with pytest.raises(
        ValueError, match=r"expected images of one kind, received 2D pictures, such as .* and 3D volumes"
    ):
        new_bundle("organ", folder, tmp_path)


def test_a_label_elsewhere_than_its_image_is_refused_with_both_affines(tmp_path):
    folder = decathlon(tmp_path / "data")
    image, label = nib.load(folder / "imagesTr/case_0.nii.gz"), nib.load(folder / "labelsTr/case_0.nii.gz")
    write_volume(
        folder / "labelsTr/case_0.nii.gz", label.get_fdata().astype(np.uint8), image.affine @ np.diag([2, 1, 1, 1])
    )
    with pytest.raises(ValueError, match=r"is not on the grid of its image: expected the affine .* received"):
        new_bundle("organ", folder, tmp_path)


def seen(tmp_path, case=0, **changes) -> DatasetStatistics:
    image, label = organ(case)
    paths = {
        "image": write_volume(tmp_path / "i.nii.gz", image * 10 - 400),
        "label": write_volume(tmp_path / "l.nii.gz", label),
    }
    options = {"class_names": ["A", "B"], "label_values": [0, 1, 2], "channels": 1, "slice_axis": 2, "modality": "MRI"}
    return DatasetStatistics([paths], **(options | changes))


def test_the_crop_holds_every_label_of_the_training(tmp_path):
    labelled = seen(tmp_path)
    assert labelled.canvas_size == 64
    assert labelled.crop_size(256) in range(16, 257, 16)
    # columns 10..17 of 24: 6 from the middle of 12, half the canvas, and an eighth on either side
    assert labelled.crop_size(256) == 192
    assert labelled.largest_component
    assert labelled.normalisation == [0.5, 99.5]


def test_ct_is_windowed_by_the_labelled_voxels(tmp_path):
    kind, low, high = seen(tmp_path, modality="CT").normalisation
    assert kind == "values"
    assert 200 <= low < high <= 1000


def test_volumes_are_seen_in_three_planes_if_their_voxels_are_nearly_cubes(tmp_path):
    assert seen(tmp_path).planes == 3
    [case] = seen(tmp_path).cases
    for spacing, expected in (((1, 1, 1.9), 3), ((1, 1, 2), 1), ((0.4, 0.5, 0.9), 1)):
        for role in ("image", "label"):
            file = nib.load(case[role])
            nib.save(nib.Nifti1Image(np.asarray(file.dataobj), np.diag([*spacing, 1])), tmp_path / f"{role}_.nii.gz")
        other = [{role: str(tmp_path / f"{role}_.nii.gz") for role in ("image", "label")}]
        statistics = seen(tmp_path)
        statistics.cases = other
        assert statistics.planes == expected, spacing


def test_a_ct_is_known_by_its_values_and_its_window_holds_the_organ_not_the_bone(tmp_path):
    folder = ct_phantom(tmp_path / "data", cases=4)
    bundle, said = new_bundle("ct", folder, tmp_path)
    values = described(bundle)
    assert values["modality"] == "CT"
    assert any("the values look like Hounsfield units" in sentence for sentence in said)
    cases = list_cases(read_data(bundle / "configs/data.json", str(folder)), "training", labelled_cases=1)
    options = {name: values[name] for name in ("class_names", "label_values", "channels", "slice_axis", "modality")}
    kind, low, high = DatasetStatistics(cases, **options).normalisation
    assert kind == "values"
    assert -80 < low < 10  # the cyst, darkest
    assert 110 < high < 250  # the liver, and no spine


def test_labelled_cases_without_a_class_are_refused(tmp_path):
    labelled = seen(tmp_path, class_names=["A", "B", "C"], label_values=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="C is in none of the 1 labelled cases"):
        _ = labelled.canvas_size


def test_no_labelled_case_shows_nothing(tmp_path):
    labelled = seen(tmp_path)
    labelled.cases = []
    with pytest.raises(ValueError, match="received none: give --labelled_cases 1 or more"):
        _ = labelled.canvas_size


def test_a_crop_that_cuts_labels_is_reported_with_their_share(tmp_path, caplog):
    paths = seen(tmp_path).cases[0]
    volume = LoadVolumed(["image", "label"], num_classes=3)(paths)
    CentralCropd(["image", "label"], roi_size=[8, 8, -1])(volume)
    assert "l.nii.gz: crop_size 8 cuts away" in caplog.text
    caplog.clear()
    CentralCropd(["image", "label"], roi_size=[20, 24, -1])(volume)
    assert not caplog.text


def test_a_slice_is_seen_between_its_neighbours():
    volume = torch.arange(4.0).expand(1, 2, 2, 4)
    widened = with_neighbours(volume)
    assert widened.shape == (3, 2, 2, 4)
    assert widened[:, 0, 0].tolist() == [[0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 3]]


def test_few_slices_are_repeated_each_time_otherwise_augmented():
    def volume(_):
        return {"image": np.zeros((1, 4, 4, 2)), "label": np.zeros((1, 4, 4, 2))}

    noise = RandGaussianNoised("image", prob=1.0, std=10)
    slices = SliceDataset([{}], volume, noise, at_least=5, progress=False)
    assert len(slices) == 6
    shown = {tuple(slices[index]["image"].flatten().tolist()) for index in range(0, 6, 2)}
    slices.set_epoch(2)
    assert len(shown | {tuple(slices[index]["image"].flatten().tolist()) for index in range(0, 6, 2)}) == 6


def test_colours_of_16_bits_are_refused(tmp_path):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)  # 2x1 pixels, 16 bits, RGB
    rows = zlib.compress(b"\0" + bytes(12))
    path = tmp_path / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=r"deep.png has colours or transparency of 16 bits: expected 8"):
        PictureReader().read(path)
