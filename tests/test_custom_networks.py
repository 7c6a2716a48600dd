"""Every network of the template on one's own data: workflows, embeddings, exports and archives."""

import ast
import hashlib
import json
import re
import shlex
import shutil
import sys
import zipfile
from functools import partial
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import assert_readme_explains_knobs
from monai.bundle import ConfigParser, ckpt_export, create_workflow, onnx_export, verify_metadata
from PIL import Image
from test_custom_data import HIPPOCAMPUS, NUCLEI, SHORT_EPOCHS, decathlon, described, plain, scores, trained

from adapt.__main__ import main
from adapt.new import new_bundle
from adapt.template import networks
from components.base.volume_metadata import case_name
from components.networks.heads import LinearHead
from components.networks.onnx_network import OnnxNetwork
from components.networks.prompt_free_sam import PromptFreeSam
from components.networks.trained_with import decode_record
from components.pretrained import pretrained_file
from components.sam.checkpoint import read_sam_checkpoint
from components.sam.encoder import SamEncoder
from release.__main__ import build

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = [name for name, network in networks().items() if network["kind"] == "encoder"]
KINDS = {
    "volumes": partial(decathlon, real=False),
    "colours": partial(plain, side=20),
    "greys": partial(plain, mode="L", side=20),
}
LONG_EPOCHS = {"labelled_cases": 1, "epochs": 1, "batch_size": 1, "image_size": 64, "is_silent": True}
QUICK = LONG_EPOCHS | SHORT_EPOCHS
SHIPPED, VIT_B, VIT_T = "phantom_unet", "vit_b", "vit_t"


def bundle_of(folder: Path, network: str, kind: str, **encoder: str) -> Path:
    """A bundle beside its data, which are in the folder `data`."""
    return new_bundle("organ", KINDS[kind](folder / "data"), folder, network=network, **encoder)[0]


def run(workflow: str, bundle: Path, *configs: str, **options) -> None:
    """Run a workflow in this process, which is quicker than in one of its own."""
    files = [str(bundle / f"configs/{name}.json") for name in configs]
    monai.bundle.run(workflow, config_file=files, logging_file=False, bundle_root=str(bundle), **options)


def parsed(bundle: Path, *configs: str, **options) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([bundle / f"configs/{name}.json" for name in configs])
    parser.update({"bundle_root": str(bundle), **options})
    return parser


def labels(folder: Path, image: str | Path) -> np.ndarray:
    """The prediction of an image in a folder: one plane of indices for a picture, a volume otherwise."""
    (path,) = folder.glob(f"{case_name(image)}_pred.*")
    return np.asarray(Image.open(path)) if path.suffix == ".png" else nib.load(path).get_fdata()


def encoder_of(model_type: str, request: pytest.FixtureRequest, folder: Path) -> dict[str, str]:
    """The options for an encoder, with a file of random weights for one that does not come with the package."""
    if model_type == SHIPPED:
        return {"model_type": SHIPPED}
    if model_type == VIT_B:
        return {"model_type": VIT_B, "sam_checkpoint": request.getfixturevalue("sam_checkpoint")}
    state = SamEncoder(model_type).image_encoder.state_dict()
    torch.save({f"image_encoder.{key}": value for key, value in state.items()}, folder / "encoder.pth")
    return {"model_type": model_type, "sam_checkpoint": str(folder / "encoder.pth")}


@pytest.mark.parametrize(
    ("network", "kind", "model_type"),
    [
        pytest.param("deeplabhead", "volumes", SHIPPED, marks=pytest.mark.slow),
        ("cnnhead", "colours", SHIPPED),
        ("linearhead", "greys", SHIPPED),
        ("linearhead", "colours", VIT_T),
        pytest.param("autosam", "volumes", SHIPPED, marks=pytest.mark.slow),
        pytest.param("linearhead", "colours", VIT_B, marks=pytest.mark.slow),
        pytest.param("autosam", "greys", VIT_B, marks=pytest.mark.slow),
        pytest.param("cnnhead", "volumes", VIT_B, marks=pytest.mark.slow),
    ],
)
def test_a_head_on_ones_own_data_trains_evaluates_and_infers(tmp_path, request, network, kind, model_type):
    bundle = bundle_of(tmp_path, network, kind, **encoder_of(model_type, request, tmp_path))
    run("training", bundle, "train", **QUICK)
    state = torch.load(bundle / "models/model.pt", weights_only=True)
    assert {key.split(".")[0] for key in state} == {"encoder", "head", "trained_with"}
    assert [key for key in state if key.startswith("encoder")] == ["encoder.fingerprint"]

    evaluated = parsed(bundle, "train", "evaluate", is_silent=True)
    run("evaluating", bundle, "train", "evaluate", is_silent=True)
    (case,) = evaluated.get_parsed_content("test#data")
    assert {row["case"] for row in scores(bundle / "eval")} == {case_name(case["image"])}
    run("inferring", bundle, "inference", dataset_dir=case["image"], output_dir=str(tmp_path / "out"))
    assert np.array_equal(labels(tmp_path / "out", case["image"]), labels(bundle / "eval", case["image"]))
    record = parsed(bundle, "inference").get_parsed_content("settings")
    assert record["image_size"] == 64
    assert record["pictures"] == (kind != "volumes")


@pytest.mark.parametrize("network", ["linearhead", "cnnhead"])
def test_a_head_on_pictures_trains_the_general_encoder_along(tmp_path, network):
    bundle = bundle_of(tmp_path, network, "greys")
    start = parsed(bundle, "train").get_parsed_content("start_checkpoint")
    assert start == (pretrained_file("general_linear_head.pt") if network == "linearhead" else None)
    run("training", bundle, "train", **QUICK)
    state = torch.load(bundle / "models/model.pt", weights_only=True)
    assert len([key for key in state if key.startswith("encoder.image_encoder.")]) > 60
    (case,) = parsed(bundle, "train", "evaluate", is_silent=True).get_parsed_content("test#data")
    run("evaluating", bundle, "train", "evaluate", is_silent=True)
    run("inferring", bundle, "inference", dataset_dir=case["image"], output_dir=str(tmp_path / "out"))
    assert np.array_equal(labels(tmp_path / "out", case["image"]), labels(bundle / "eval", case["image"]))


def test_every_class_of_pictures_starts_as_an_object_of_any_kind():
    encoder = SamEncoder("general_unet", pretrained_file("general_unet.pth"), 64)
    file = pretrained_file("general_linear_head.pt")
    objects, own = (
        PromptFreeSam(
            encoder, LinearHead(classes), "fp32", start_checkpoint=file, trained_with={"class_names": names}
        ).eval()
        for classes, names in ((2, ["object"]), (4, ["a", "b", "c"]))
    )
    images = torch.rand(1, 3, 64, 64) * 255
    with torch.no_grad():
        expected, logits = objects(images), own(images)
    assert torch.allclose(logits[:, :1], expected[:, :1], atol=1e-4)
    assert torch.allclose(logits[:, 1:], expected[:, 1:].expand(-1, 3, -1, -1), atol=1e-4)
    assert decode_record(own.get_buffer("trained_with")) == {"class_names": ["a", "b", "c"]}


@pytest.mark.parametrize("kind", ["volumes", "greys"])
def test_embeddings_of_all_views_are_looked_up_once_they_have_been_shown(tmp_path, caplog, kind):
    caplog.set_level("INFO", "components.embeddings.cache")
    bundle = bundle_of(tmp_path, "linearhead", kind)
    slices = 3 if kind == "volumes" else 1
    for run_number, encoded in ((1, 16 * slices + slices), (2, 0)):  # views of the labelled case; one to validate on
        caplog.clear()
        options = LONG_EPOCHS | {
            "epochs": 3,
            "is_silent": False,
            "batch_size": 2,
            "test_time_views": 1,
            "planes": 1,
            "trainable_encoder": False,
            "seed": run_number,
        }
        run("training", bundle, "train", **options, output_dir=str(tmp_path / "eval"))
        assert f"embedding cache {bundle}/../embeddings: {17 * slices} embeddings" in caplog.text
        assert f"encoded {encoded}\n" in caplog.text


@pytest.mark.parametrize("trainable", [True, "neck"])
def test_what_trains_the_encoder_along_shows_fresh_views_and_keeps_no_embedding(tmp_path, trainable):
    bundle = bundle_of(tmp_path, "linearhead", "greys")
    given = parsed(bundle, "train", trainable_encoder=trainable)
    assert [given.get_parsed_content(knob) for knob in ("views", "cache_dir")] == [0, None]
    overlay = () if trainable is True else ("neck",)
    options = {} if overlay else {"trainable_encoder": True}
    run("training", bundle, "train", *overlay, **QUICK, **options, start_checkpoint="$None")
    assert not (tmp_path / "embeddings").exists()
    trained_encoder = torch.load(bundle / "models/model.pt", weights_only=True)
    shipped = read_sam_checkpoint(pretrained_file("general_unet.pth"))["image_encoder"]
    changed = [
        key for key, value in shipped.items() if not torch.equal(trained_encoder[f"encoder.image_encoder.{key}"], value)
    ]
    assert 0 < len(changed) < len(shipped) if overlay else len(changed) == len(shipped)


@pytest.mark.parametrize(
    ("network", "kind"), [("unet", "greys"), pytest.param("linearhead", "volumes", marks=pytest.mark.slow)]
)
def test_an_exported_network_equals_the_trained_one_and_says_what_it_was_trained_with(tmp_path, network, kind):
    bundle = bundle_of(tmp_path, network, kind)
    if network == "unet":
        trained(bundle)
    else:
        run("training", bundle, "train", **QUICK, views=1)
    config, model, exported = (str(bundle / name) for name in ("configs/inference.json", "models/model.pt", "model.ts"))
    root = {"bundle_root": str(bundle)}
    metadata = str(bundle / "configs/metadata.json")
    ckpt_export("network_def", exported, model, metadata, config, **root)
    eager = parsed(bundle, "inference", precision="fp32", **{"network_def#start_checkpoint": model})
    scripted = parsed(bundle, "inference", "inference_ts", ts_path=exported, ckpt_path="no such file")
    readme = (bundle / "docs/README.md").read_text()
    command = shlex.split(re.search(r"^python .* onnx_export .*$", readme, flags=re.MULTILINE)[0])
    given = [command[command.index(option) + 1] for option in ("--input_shape", "--converter_kwargs")]
    shape, options = map(ast.literal_eval, given)
    onnx = str(bundle / "models/model.onnx")
    onnx_export("network_def", onnx, model, metadata, config, input_shape=shape, converter_kwargs=options, **root)
    images = torch.rand(3, 3, *(shape[2:] if network == "linearhead" else (64, 48))) * 255
    with torch.no_grad():
        expected, *others = (parser.get_parsed_content("network").eval()(images) for parser in (eager, scripted))
    spread = float(expected.max() - expected.min())
    for logits in (*others, OnnxNetwork(onnx)(images)):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * spread)
    of_both = [parser.get_parsed_content("settings") for parser in (eager, scripted)]
    assert of_both[0] == of_both[1]
    assert of_both[1]["crop_size"] == 64


def unpacked(bundle: Path, folder: Path, **options) -> Path:
    """The folder in which an archive of a bundle has been unpacked."""
    build(str(folder / "dist"), bundle=str(bundle), **options)
    with zipfile.ZipFile(folder / f"dist/{bundle.name}_v0.1.0.zip") as file:
        file.extractall(folder / "elsewhere")
    return folder / "elsewhere" / bundle.name


def a_case(bundle: Path) -> str:
    return parsed(bundle, "train").get_parsed_content("train#dataset#data")[0]["image"]


def segments_as_before(bundle: Path, archive: Path, folder: Path) -> bool:
    """Whether a bundle and its unpacked archive say the same of an image."""
    image = a_case(bundle)
    for name, root in (("here", bundle), ("there", archive)):
        run("inferring", root, "inference", dataset_dir=image, output_dir=str(folder / name))
    return np.array_equal(labels(folder / "there", image), labels(folder / "here", image))


def test_a_trained_head_becomes_an_archive_that_segments_elsewhere(tmp_path):
    bundle = bundle_of(tmp_path, "cnnhead", "colours")
    run("training", bundle, "train", **QUICK)
    root = unpacked(bundle, tmp_path)
    packed = root / "components/pretrained/phantom_unet.pth"
    assert packed.read_bytes() == Path(pretrained_file("phantom_unet.pth")).read_bytes()
    assert segments_as_before(bundle, root, tmp_path)


@pytest.fixture
def of_own_encoder(tmp_path) -> tuple[Path, Path]:
    """A trained linear head on an encoder of one's own, and that encoder's file."""
    file = Path(shutil.copy(pretrained_file("phantom_unet.pth"), tmp_path / "mine.pt"))
    bundle = bundle_of(tmp_path, "linearhead", "greys", model_type=SHIPPED, sam_checkpoint=str(file))
    run("training", bundle, "train", **QUICK, views=1)
    return bundle, file


def test_an_archive_holds_an_encoder_of_ones_own(tmp_path, of_own_encoder):
    bundle, file = of_own_encoder
    root = unpacked(bundle, tmp_path)
    assert (root / "models/mine.pth").read_bytes() == file.read_bytes()
    assert str(file) not in "".join(path.read_text() for path in root.glob("configs/*.json"))
    assert segments_as_before(bundle, root, tmp_path)


def test_an_archive_says_where_an_encoder_of_ones_own_is_that_is_too_large_for_it(
    tmp_path, of_own_encoder, monkeypatch
):
    bundle, file = of_own_encoder
    monkeypatch.setattr("release.bundles.FILE_LIMIT", file.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"of an archive's file: .* give --encoder_url URL"):
        build(str(tmp_path / "dist"), bundle=str(bundle))
    root = unpacked(bundle, tmp_path, encoder_url="https://example.org/mine.pt")
    (listed,) = yaml.safe_load((root / "large_files.yml").read_text())["large_files"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (listed["url"], listed["hash_val"]) == ("https://example.org/mine.pt", digest)
    assert not (root / listed["path"]).exists()
    shutil.copy(file, root / listed["path"])
    assert segments_as_before(bundle, root, tmp_path)


def test_pictures_start_from_a_linear_head_of_any_object_in_an_archive_too_and_volumes_from_a_fresh_unet(tmp_path):
    cells, said = new_bundle("cells", KINDS["colours"](tmp_path / "data"), tmp_path)
    assert said[-1].startswith("the network is linearhead;")
    network = parsed(trained(cells), "train", labelled_cases=1).get_parsed_content("network_def")
    known = SamEncoder("general_unet", pretrained_file("general_unet.pth"), network.encoder.image_size)
    assert torch.equal(network.encoder.fingerprint, known.fingerprint) and network.encoder.trainable is True
    objects = torch.load(pretrained_file("general_linear_head.pt"), weights_only=True)["head.7.weight"].float()
    assert torch.equal(network.head[7].weight, objects)
    packed = unpacked(cells, tmp_path) / "components/pretrained/general_linear_head.pt"
    assert packed.read_bytes() == Path(pretrained_file("general_linear_head.pt")).read_bytes()

    organ, said = new_bundle("volumes", KINDS["volumes"](tmp_path / "volumes_data"), tmp_path)
    assert said[-1].startswith("the network is unet;")
    assert parsed(organ, "train").get_parsed_content("start_checkpoint") is None


@pytest.mark.parametrize(("kind", "channels"), [("colours", 3), ("greys", 1)])
def test_a_unet_on_pictures_starts_from_random_weights_and_sees_their_channels(tmp_path, kind, channels):
    parser = parsed(bundle_of(tmp_path, "unet", kind), "train", labelled_cases=1)
    assert parser.get_parsed_content("start_checkpoint") is None
    assert parser.get_parsed_content("network_def").unet.conv_0.conv_0.conv.in_channels == channels


def test_an_encoder_without_a_network_is_below_a_linear_head(tmp_path):
    organ, said = new_bundle("organ", KINDS["volumes"](tmp_path / "data"), tmp_path, model_type="vit_b")
    assert said[-1].startswith("the network is linearhead;")
    assert parsed(organ, "train").config["model_type"] == "vit_b"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", networks())
def test_documents_and_metadata_are_complete(tmp_path, metadata_schema, network, kind):
    assert_complete(bundle_of(tmp_path, network, kind), metadata_schema)


def assert_complete(bundle: Path, metadata_schema: str) -> None:
    """Check the metadata, the table of knobs, and that no place of the template has stayed as it is."""
    verify_metadata(meta_file=str(bundle / "configs/metadata.json"), filepath=metadata_schema, create_dir=False)
    for path in (*bundle.glob("configs/*.json"), bundle / "docs/README.md"):
        assert not re.search(r"\{\{|\"\.\.\.\w|_only_for_|<!--", path.read_text()), path
    by_data = ("class_names", "label_values", "modality", "normalisation", "is_fine")
    assert_readme_explains_knobs(bundle, "train", except_for=by_data)


def assert_workflows_are_whole(bundle: Path, **options) -> None:
    """Check that every workflow has all that MONAI asks for, which instantiates it."""
    for names in (("train",), ("train", "evaluate"), ("inference",)):
        kind = "train" if "train" in names else "infer"
        files = [str(bundle / f"configs/{name}.json") for name in names]
        workflow = create_workflow(config_file=files, workflow_type=kind, bundle_root=str(bundle), **options)
        assert workflow.check_properties() == [], names


@pytest.mark.parametrize(
    ("network", "kind"),
    [("autosam", "greys"), ("cnnhead", "volumes"), ("linearhead", "colours"), ("unet", "volumes"), ("unet", "colours")],
)
def test_every_workflow_has_what_monai_asks_for(tmp_path, network, kind):
    assert_workflows_are_whole(bundle_of(tmp_path, network, kind), is_silent=True)


def test_what_takes_another_encoder_is_whole_and_trains_for_120_epochs_or_the_steps_given(tmp_path, metadata_schema):
    file = Path(shutil.copy(pretrained_file("phantom_unet.pth"), tmp_path / "mine.pth"))
    bundle = bundle_of(tmp_path, "cnnhead", "greys", model_type=SHIPPED, sam_checkpoint=str(file))
    assert_complete(bundle, metadata_schema)
    assert_workflows_are_whole(bundle, is_silent=True)
    options = {"labelled_cases": 1, "batch_size": 1}
    by_default = parsed(bundle, "train", **options)
    assert [by_default.get_parsed_content(knob) for knob in ("epochs", "depth", "sam_checkpoint")] == [
        120,
        4,
        str(file),
    ]
    assert parsed(bundle, "train", **options, steps=50).get_parsed_content("epochs") == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"network": "resnet"}, ValueError, "unknown network 'resnet': expected one of autosam, cnnhead, deeplabhead"),
        (
            {"network": "unet", "model_type": "vit_b"},
            ValueError,
            "unet has no encoder for vit_b: expected one of autosam, cnnhead",
        ),
        (
            {"network": "cnnhead", "model_type": "vit_x"},
            ValueError,
            "no published encoder has model_type 'vit_x': expected one of phantom_unet, general.* --checkpoint FILE",
        ),
        (
            {"network": "cnnhead", "model_type": "vit_b", "sam_checkpoint": "gone.pth"},
            FileNotFoundError,
            "there is no encoder checkpoint gone.pth: give --checkpoint FILE, from https://github.com",
        ),
    ],
    ids=["unknown network", "no encoder", "unknown encoder", "no file"],
)
def test_another_network_or_encoder_is_refused_before_the_data_are_read(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        new_bundle("organ", tmp_path / "no such folder", tmp_path / "bundles", **options)
    assert not (tmp_path / "bundles").exists()


def test_an_encoder_s_file_that_does_not_fit_is_refused_with_the_type_that_it_has(tmp_path, sam_checkpoint):
    with pytest.raises(
        ValueError, match="is a vit_b checkpoint, but model_type is phantom_unet: give --model_type vit_b"
    ):
        bundle_of(tmp_path, "linearhead", "greys", sam_checkpoint=sam_checkpoint)
    with pytest.raises(ValueError, match="unknown model_type 'vit_x'"):
        new_bundle(
            "organ", tmp_path / "data", tmp_path, network="cnnhead", model_type="vit_x", sam_checkpoint=sam_checkpoint
        )
    assert not (tmp_path / "organ").exists()


def test_a_bundle_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    data = KINDS["greys"](tmp_path / "data")

    def fail(*_: object) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr("adapt.new._value", fail)
    with pytest.raises(OSError, match="no space left"):
        new_bundle("organ", data, tmp_path / "bundles", network="linearhead")
    assert list((tmp_path / "bundles").iterdir()) == []


def test_the_command_line_makes_a_bundle_of_a_network_and_says_what_it_refuses(tmp_path, monkeypatch, capsys):
    data = KINDS["greys"](tmp_path / "data")
    command = ["adapt", "new", "cells", "--data", str(data), "--output_dir", str(tmp_path)]

    def adapt(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", [*command, *options])
        with pytest.raises(SystemExit) as ended:
            main()
        if ended.value.code:
            raise ended.value
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match=r"^ValueError: unet has no encoder for vit_b: expected one of autosam"):
        adapt("--network", "unet", "--model_type", "vit_b")
    said = adapt("--network", "linearhead")
    assert "the network is linearhead; --network also takes autosam, cnnhead, deeplabhead, unet" in said
    assert "training starts from weights learned on random shapes, and trains the encoder, general_unet, too" in said
    target = json.loads((tmp_path / "cells/configs/train.json").read_text())["network_def"]["head"]["_target_"]
    assert target == "components.networks.LinearHead"


def some_of(kind: str, acdc_dir: str, root: Path) -> Path:
    """A few real cases: of the hippocampus, nuclei in pictures, or hearts."""
    if kind == "hippocampus":
        return decathlon(root, real=True)
    if kind == "nuclei":
        pictures = sorted((NUCLEI / "images").iterdir())[:8]
        for folder in ("images", "labels"):
            (root / folder).mkdir(parents=True)
            for path in pictures:
                shutil.copy(NUCLEI / folder / path.name, root / folder)
        return root
    root.mkdir()
    for patient in sorted((Path(acdc_dir) / "training").iterdir())[:7]:
        (root / patient.name).symlink_to(patient)
    return root


@pytest.mark.slow
@pytest.mark.skipif(not (NUCLEI.is_dir() and HIPPOCAMPUS.is_dir()), reason="no nuclei and no hippocampus at hand")
@pytest.mark.parametrize("kind", ["hippocampus", "nuclei", "hearts"])
@pytest.mark.parametrize("network", networks())
def test_every_network_works_on_real_data_in_its_bundle_and_packed(tmp_path, acdc_dir, network, kind):
    data = some_of(kind, acdc_dir, tmp_path / "data")
    bundle, _ = new_bundle("organ", data, tmp_path, network=network)
    run("training", bundle, "train", labelled_cases=1, steps=20, val_interval=1, is_silent=True)
    run("evaluating", bundle, "train", "evaluate", is_silent=True)
    (tested, *_) = parsed(bundle, "train").get_parsed_content("test#data")
    archive = unpacked(bundle, tmp_path)
    run("inferring", archive, "inference", dataset_dir=tested["image"], output_dir=str(tmp_path / "out"))
    assert np.array_equal(labels(tmp_path / "out", tested["image"]), labels(bundle / "eval", tested["image"]))
    rows = scores(bundle / "eval")
    assert {row["class"] for row in rows} == set(described(bundle)["class_names"])
    if kind == "hearts" or (network, kind) == ("linearhead", "nuclei"):  # else 20 steps are too few from random weights
        assert np.mean([float(row["dice"]) for row in rows]) > (0.5 if kind == "hearts" else 0.3)
