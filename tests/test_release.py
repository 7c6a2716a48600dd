"""Archives of the bundles: what they hold, that they are reproducible, and that they work where they are unpacked."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import huggingface_hub
import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, assert_readme_explains_knobs, messages_of, run_monai_bundle_here, succeeds
from monai.bundle import ConfigParser, verify_metadata
from PIL import Image

import components
from adapt.new import new_bundle
from adapt.template import KNOBS_LINK, encoders
from components.pretrained import pretrained_file
from components.sam.encoder import SamEncoder
from release import bundles
from release.__main__ import build
from release.archives import write_archive, write_model_info
from release.bundles import PACKED, check_release_facts, picture_of
from release.picture import draw_picture

BESIDE_MODELS = ("general_unet.pth", "general_linear_head.pt", "click_head.pt", "general_click_head.pt")
VERSION = components.__version__
MODELS = {
    "autosam": "vit_head.pt",
    "cnnhead": "cnn_head.pt",
    "deeplabhead": "deeplab_head.pt",
    "linearhead": "linear_head.pt",
    "unet": "unet.pt",
}


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The archives with the shipped weights inside."""
    folder = tmp_path_factory.mktemp("dist")
    build(str(folder))
    return folder


@pytest.fixture(scope="module")
def unpacked(dist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    for archive in dist.glob("*.zip"):
        unpack(archive, folder)
    return folder


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack an archive into a folder; return the bundle's."""
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
        return folder / file.namelist()[0].partition("/")[0]


def entries(archive: Path) -> dict[str, int]:
    with zipfile.ZipFile(archive) as file:
        return {entry.filename: entry.file_size for entry in file.infolist()}


def config(root: Path, name: str) -> dict:
    return json.loads((root / f"configs/{name}.json").read_text())


def test_every_bundle_has_an_archive_in_the_zoos_layout(dist):
    assert set(PACKED) == {f"{network}_acdc" for network in MODELS}
    assert {path.name for path in dist.iterdir()} == {
        *(f"{bundle}_v{VERSION}.zip" for bundle in PACKED),
        "model_info.json",
    }
    for bundle in PACKED:
        files = entries(dist / f"{bundle}_v{VERSION}.zip")
        expected = {"LICENSE", "configs/metadata.json", "configs/train.json", "configs/logging.conf", "docs/README.md"}
        assert {f"{bundle}/{name}" for name in (*expected, "docs/data_license.txt")} <= files.keys()
        assert all(name.startswith(f"{bundle}/") for name in files)
        assert max(files.values()) <= 25e6
        packed = {name.removeprefix(f"{bundle}/") for name in files if "/components/" in name}
        weights = {*MODELS.values(), "phantom_unet.pth", *BESIDE_MODELS, "record.json"}
        assert packed == {
            *(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "components").rglob("*.py")),
            "components/function/predicted_dice.json",
            *(f"components/pretrained/{name}" for name in weights),
        }


def test_model_info_points_to_the_archives(dist):
    info = json.loads((dist / "model_info.json").read_text())
    assert info.keys() == {f"{bundle}_v{VERSION}" for bundle in PACKED}
    for name, entry in info.items():
        assert entry["checksum"] == hashlib.sha1((dist / f"{name}.zip").read_bytes()).hexdigest()
        assert entry["source"] == f"{name}.zip"


def test_model_info_keeps_other_archives(tmp_path):
    archive = tmp_path / "mine_v1.0.0.zip"
    archive.write_bytes(b"zip")
    (tmp_path / "model_info.json").write_text('{"other_v0.1.0": {"checksum": "1", "source": "s"}}')
    write_model_info([archive], tmp_path / "model_info.json", base_url="https://example.org/files/")
    info = json.loads((tmp_path / "model_info.json").read_text())
    assert list(info) == ["mine_v1.0.0", "other_v0.1.0"]
    assert info["mine_v1.0.0"]["source"] == "https://example.org/files/mine_v1.0.0.zip"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "9.9.9"}, "metadata.json of autosam_acdc has version 9.9.9: expected"),
        ({"changelog": {}}, "expected a line of that version in its changelog"),
        ({"pytorch_version": "1.0.0"}, "pins torch 1.0.0: expected .*, which constraints.txt"),
        ({"required_packages_version": {"scipy": "1.0.0"}}, "pins scipy 1.0.0"),
        ({"required_packages_version": {"unknown": "1.0.0"}}, "pins unknown 1.0.0: expected None"),
    ],
)
def test_nothing_is_packed_while_a_bundle_tells_other_versions(changes, message, tmp_path, monkeypatch):
    check_release_facts()
    path = tmp_path / "autosam_acdc/configs/metadata.json"
    shutil.copytree(REPOSITORY / "bundles/autosam_acdc/configs", path.parent)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    monkeypatch.setattr(bundles, "BUNDLES", tmp_path)
    with pytest.raises(ValueError, match=message):
        build(str(tmp_path / "dist"))
    assert not (tmp_path / "dist").exists()


def test_two_builds_give_the_same_bytes(dist, tmp_path):
    build(str(tmp_path), bundle="linearhead_acdc")
    name = f"linearhead_acdc_v{VERSION}.zip"
    assert (tmp_path / name).read_bytes() == (dist / name).read_bytes()


@pytest.mark.parametrize("bundle", PACKED)
def test_archive_has_the_bundles_files_as_they_are_and_the_shipped_model(bundle, unpacked):
    source, root = REPOSITORY / "bundles" / bundle, unpacked / bundle
    folders = ("configs", "docs")
    for name in (*folders, "."):
        kept = {path.name: path.read_bytes() for path in (source / name).glob("[!.]*") if path.is_file()}
        kept.pop("large_files.yml", None)  # SAM's, which an archive with the shipped encoder does not need
        packed = {path.name: path.read_bytes() for path in (root / name).iterdir() if path.is_file()}
        if name == "docs":
            del packed["example.jpg"]
            packed["README.md"] = re.sub(rb"!\[.*\n\n\*.*\*\n\n", b"", packed["README.md"])
            packed["README.md"] = re.sub(rb"\| knob of (.+\n)+", f"{KNOBS_LINK}\n".encode(), packed["README.md"])
        assert packed == kept
    assert {path.name for path in root.iterdir() if path.is_dir()} == {*folders, "components", "models"}
    assert [path.name for path in (root / "models").iterdir()] == ["model.pt"]
    assert (root / "models/model.pt").read_bytes() == Path(
        pretrained_file(MODELS[bundle.removesuffix("_acdc")])
    ).read_bytes()


def test_what_a_bundle_of_the_collection_has_trained_is_not_packed_unasked(tmp_path, monkeypatch):
    shutil.copytree(REPOSITORY / "bundles/unet_acdc", tmp_path / "unet_acdc", ignore=shutil.ignore_patterns("models"))
    (tmp_path / "unet_acdc/models").mkdir()
    (tmp_path / "unet_acdc/models/model.pt").write_bytes(b"of patients")
    monkeypatch.setattr(bundles, "BUNDLES", tmp_path)
    root = bundles.assemble("unet_acdc", tmp_path / "packed")
    assert (root / "models/model.pt").read_bytes() == Path(pretrained_file("unet.pt")).read_bytes()


@pytest.mark.parametrize("bundle", PACKED)
def test_metadata_of_archives_follow_the_schema(bundle, unpacked, metadata_schema):
    path = unpacked / bundle / "configs/metadata.json"
    verify_metadata(meta_file=str(path), filepath=metadata_schema, create_dir=False)


NAMED_FILE = re.compile(r"(?<![\w/.<])((?:(?:configs|docs|components)/)?[\w/]+\.(?:json|md|txt|jpg|png|yml|py|conf))\b")


def missing_files(card: Path, root: Path) -> set[str]:
    """The files that a card names, by path or by name alone, and that its bundle does not have."""
    folders = (root, root / "configs", card.parent)
    named = NAMED_FILE.findall(card.read_text())
    return {name for name in named if not any((folder / name).is_file() for folder in folders)}


@pytest.mark.parametrize("bundle", PACKED)
def test_readme_of_an_archive_names_files_that_it_has(bundle, unpacked):
    root = unpacked / bundle
    card = root / "docs/README.md"
    assert "configs/train.json" in NAMED_FILE.findall(card.read_text())
    assert missing_files(card, root) == set()
    assert "download_large_files" not in card.read_text()
    assert not (root / "large_files.yml").exists()  # the zoo's checks would download what no one needs


@pytest.mark.parametrize("bundle", PACKED)
def test_readme_of_an_archive_explains_every_knob_with_its_default(bundle, unpacked):
    assert_readme_explains_knobs(unpacked / bundle, "train")


def test_files_that_a_card_names_in_vain_are_found(unpacked, tmp_path):
    card = tmp_path / "README.md"
    card.write_text(
        "![x](example.jpg), `docs/results.md`, configs/train.json, ['configs/no.json'], `other.json`, <case>.txt"
    )
    assert missing_files(card, unpacked / "unet_acdc") == {
        "example.jpg",
        "docs/results.md",
        "configs/no.json",
        "other.json",
    }


@pytest.mark.parametrize("bundle", PACKED)
def test_card_tells_the_weights_that_its_network_trains(bundle, unpacked):
    parser = ConfigParser()
    parser.read_config(unpacked / bundle / "configs/train.json")
    network = parser.get_parsed_content("network_def")
    count = sum(weights.numel() for weights in network.parameters() if weights.requires_grad)
    assert f"{count:,}" in (unpacked / bundle / "docs/README.md").read_text()


def test_papers_baseline_has_the_weights_that_its_card_tells(unpacked):
    parser = ConfigParser()
    parser.read_config([unpacked / f"unet_acdc/configs/{name}.json" for name in ("train", "from_scratch")])
    count = sum(weights.numel() for weights in parser.get_parsed_content("network_def").parameters())
    assert f"{count / 1e6:.0f}M weights from scratch" in (unpacked / "unet_acdc/docs/README.md").read_text()


@pytest.mark.parametrize("bundle", PACKED)
def test_card_and_metadata_tell_the_scores_of_the_page_of_results(bundle, unpacked):
    metrics = config(unpacked / bundle, "metadata")["eval_metrics"]
    card = (unpacked / bundle / "docs/README.md").read_text()
    performance = re.findall(r"^- (0\.\d{3}) on (\d+) ACDC patients", card, flags=re.MULTILINE)
    expected = {"mean_dice": "76", "mean_dice_development": "24"}
    assert performance == [(f"{value:.3f}", expected[name]) for name, value in metrics.items()]
    row = rf"^\| 76 \| none \| `{bundle}` \| ([\d.]+) "
    others = re.findall(row, (REPOSITORY / "docs/results.md").read_text(), flags=re.MULTILINE)
    assert others == [f"{100 * metrics[name]:.1f}" for name in ("mean_dice",) if name in metrics]


@pytest.mark.parametrize("bundle", PACKED)
def test_card_of_an_archive_shows_a_small_picture(bundle, unpacked):
    picture = unpacked / bundle / "docs/example.jpg"
    assert "truth and prediction](example.jpg)" in picture.with_name("README.md").read_text()
    assert picture.stat().st_size < 60e3
    assert picture.read_bytes() == picture_of(bundle).read_bytes()


def test_picture_is_what_the_shipped_model_makes_of_a_phantom(tmp_path):
    drawn, kept = (
        np.asarray(Image.open(file).convert("L"), dtype=float)
        for file in (draw_picture("linearhead_acdc", tmp_path / "example.jpg"), picture_of("linearhead_acdc"))
    )
    assert drawn.shape == kept.shape
    assert np.corrcoef(drawn.ravel(), kept.ravel())[0, 1] > 0.9  # fonts and single voxels may differ


def test_archive_without_a_picture_says_how_to_draw_it(tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "picture_of", lambda bundle: tmp_path / f"{bundle}.jpg")
    with pytest.raises(FileNotFoundError, match=r"unet_acdc\.jpg .*python -m release --pictures"):
        build(str(tmp_path / "dist"), bundle="unet_acdc")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Path:
    """The archives of the paper's recipe on vit_b."""
    folder = tmp_path_factory.mktemp("recipes")
    build(str(folder), model_type="vit_b")
    return folder


@pytest.mark.parametrize(
    "model_type", [name if name == "vit_b" else pytest.param(name, marks=pytest.mark.slow) for name in encoders()]
)
def test_archive_of_the_papers_recipe_says_where_sams_weights_are(model_type, recipes, tmp_path):
    if model_type != "vit_b":
        build(str(tmp_path), model_type=model_type, bundle="cnnhead_acdc")
    archives = recipes if model_type == "vit_b" else tmp_path
    root = unpack(archives / f"cnnhead_acdc_{model_type}_v{VERSION}.zip", tmp_path)
    assert root.name == f"cnnhead_acdc_{model_type}"
    (entry,) = yaml.safe_load((root / "large_files.yml").read_text())["large_files"]
    published = encoders()[model_type]
    assert entry["path"] == f"models/{published['file']}"
    assert entry["url"].endswith(published["file"])
    assert re.fullmatch(r"[0-9a-f]{64}", entry["hash_val"])
    train = config(root, "train")
    assert (train["model_type"], train["learning_rate"], train["depth"]) == (model_type, 0.0005, 4)
    assert train["start_checkpoint"] is None
    assert config(root, "inference")["model_type"] == model_type
    assert not (root / "models").exists()
    assert config(root, "metadata")["eval_metrics"] == {}
    assert missing_files(root / "docs/README.md", root) == set()
    assert_readme_explains_knobs(root, "train")


def test_every_head_has_an_archive_of_the_papers_recipe(recipes):
    heads = {"autosam_acdc", "cnnhead_acdc", "deeplabhead_acdc", "linearhead_acdc"}
    assert {path.name for path in recipes.glob("*.zip")} == {f"{head}_vit_b_v{VERSION}.zip" for head in heads}


def other_head(file: str, folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """A head that has learned something, for the shipped encoder: its file, and what it holds."""
    state = torch.load(pretrained_file(file), weights_only=True)
    next(value for key, value in state.items() if key.endswith("bias")).add_(1)
    torch.save(state, folder / "mine.pt")
    return str(folder / "mine.pt"), state


def test_trained_head_goes_into_the_archive_of_its_encoder_only(tmp_path):
    mine, state = other_head("linear_head.pt", tmp_path)
    build(str(tmp_path), bundle="linearhead_acdc", model=mine)
    with zipfile.ZipFile(tmp_path / f"linearhead_acdc_v{VERSION}.zip") as file:
        assert file.read("linearhead_acdc/models/model.pt") == Path(mine).read_bytes()
        assert json.loads(file.read("linearhead_acdc/configs/metadata.json"))["eval_metrics"] == {}
        assert b"example.jpg" not in file.read("linearhead_acdc/docs/README.md")
    state["encoder.fingerprint"] = state["encoder.fingerprint"].flip(0)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(RuntimeError) as caught:  # MONAI wraps a component's error in one of its own
        build(str(tmp_path / "none"), bundle="linearhead_acdc", model=str(tmp_path / "other.pt"))
    assert "that the head was trained with" in messages_of(caught.value)
    assert not (tmp_path / "none").exists()


def test_model_needs_its_bundle_its_file_and_its_encoder(tmp_path):
    head = pretrained_file("linear_head.pt")
    with pytest.raises(ValueError, match=r"choose one of .* with --bundle"):
        build(str(tmp_path), model=head)
    with pytest.raises(FileNotFoundError, match=r"there is no model nothing\.pt: .*give --model FILE"):
        build(str(tmp_path), bundle="linearhead_acdc", model="nothing.pt")
    with pytest.raises(RuntimeError) as caught:
        build(str(tmp_path), model_type="vit_b", bundle="linearhead_acdc", model=head)
    assert "no encoder checkpoint at" in messages_of(caught.value)
    assert not any(tmp_path.iterdir())


def own_bundle(folder: Path, encoder: SamEncoder | None = None) -> Path:
    """A bundle with a linear head for one's own pictures, on the shipped encoder or on one whose file is kept."""
    for role in ("images", "masks"):
        (folder / "data" / role).mkdir(parents=True)
        for number in range(8):
            pixels = np.zeros((40, 40), np.uint8)
            pixels[5 : 12 + number, 20:30] = 255
            Image.fromarray(pixels).save(folder / f"data/{role}/cell_{number}.png")
    options = {}
    if encoder is not None:
        from_sam = torch.load(pretrained_file("phantom_unet.pth"), weights_only=True)
        others = {key: value for key, value in from_sam.items() if not key.startswith("image_encoder.")}
        own = {f"image_encoder.{key}": value for key, value in encoder.image_encoder.state_dict().items()}
        torch.save(others | own, folder / "tiny.pt")
        options = {"model_type": encoder.model_type, "sam_checkpoint": str(folder / "tiny.pt")}
    return new_bundle("cells", folder / "data", folder, network="linearhead", **options)[0]


def trained(bundle: Path, **knobs) -> Path:
    """Give it a model with random weights that says all that a training writes."""
    parser = ConfigParser()
    parser.read_config(bundle / "configs/train.json")
    parser.update({"bundle_root": str(bundle), "labelled_cases": 1, "cache_dir": None, **knobs})
    (bundle / "models").mkdir()
    torch.save(parser.get_parsed_content("network_def").state_dict(), bundle / "models/model.pt")
    return bundle


def test_own_bundle_with_a_head_takes_the_shipped_encoder_along(tmp_path):
    bundle = own_bundle(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no model .*: run training in .*cells first"):
        build(str(tmp_path / "dist"), bundle=str(bundle))
    trained(bundle)
    with pytest.raises(ValueError, match="has its own encoder: expected no model_type"):
        build(str(tmp_path / "dist"), bundle=str(bundle), model_type="vit_b")
    build(str(tmp_path / "dist"), bundle=str(bundle))
    root = unpack(tmp_path / "dist/cells_v0.1.0.zip", tmp_path / "elsewhere")
    for name in ("train", "inference"):
        assert config(root, name) == config(bundle, name)
    assert config(root, "data") == config(bundle, "data") | {"dataset_dir": ""}
    shutil.copytree(tmp_path / "data/images", tmp_path / "pictures")
    shutil.rmtree(bundle)
    shutil.rmtree(tmp_path / "data")
    packed = root / "components/pretrained/phantom_unet.pth"
    assert packed.read_bytes() == Path(pretrained_file("phantom_unet.pth")).read_bytes()
    run = ("run", "inferring", "--config_file", "configs/inference.json", "--dataset_dir", str(tmp_path / "pictures"))
    run_monai_bundle_here(*run, cwd=root)
    assert len(list((root / "eval").glob("*_pred.png"))) == 8


def test_own_bundle_takes_an_encoder_of_ones_own_along(tmp_path, monkeypatch):
    bundle = trained(own_bundle(tmp_path, SamEncoder("phantom_unet")))
    assert config(bundle, "train")["sam_checkpoint"] == str(tmp_path / "tiny.pt")
    build(str(tmp_path / "dist"), bundle=str(bundle))
    root = unpack(tmp_path / "dist/cells_v0.1.0.zip", tmp_path / "elsewhere")
    assert {path.name for path in (root / "models").iterdir()} == {"model.pt", "tiny.pth"}
    assert (root / "models/tiny.pth").read_bytes() == (tmp_path / "tiny.pt").read_bytes()
    for name in ("train", "inference"):
        place = {"sam_checkpoint": "$@bundle_root + '/models/tiny.pth'"}
        assert config(root, name) == config(bundle, name) | place
    parser = ConfigParser()
    parser.read_config(root / "configs/inference.json")
    parser["bundle_root"] = str(root)
    own = SamEncoder("phantom_unet", str(tmp_path / "tiny.pt")).state_dict()
    packed = parser.get_parsed_content("network_def").encoder.state_dict()
    assert torch.equal(packed["fingerprint"], own["fingerprint"])

    monkeypatch.setattr(bundles, "FILE_LIMIT", 10**6)
    with pytest.raises(ValueError, match=r"tiny\.pt has \d+ MB, more than the 1 MB .*give --encoder_url URL"):
        build(str(tmp_path / "large"), bundle=str(bundle))
    build(str(tmp_path / "large"), bundle=str(bundle), encoder_url="https://example.org/tiny.pt")
    root = unpack(tmp_path / "large/cells_v0.1.0.zip", tmp_path / "downloaded")
    (entry,) = yaml.safe_load((root / "large_files.yml").read_text())["large_files"]
    assert (entry["path"], entry["url"]) == ("models/tiny.pth", "https://example.org/tiny.pt")
    assert entry["hash_val"] == hashlib.sha256((tmp_path / "tiny.pt").read_bytes()).hexdigest()


def test_model_of_other_classes_than_a_bundles_is_refused(tmp_path):
    bundle = trained(own_bundle(tmp_path), out_channels=3)
    with pytest.raises(RuntimeError) as caught:
        build(str(tmp_path / "dist"), bundle=str(bundle))
    assert "it was trained with out_channels 3, received 2" in messages_of(caught.value)
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "vit_x"}, "unknown model_type 'vit_x': expected one of phantom_unet, vit_b"),
        ({"bundle": "acdc"}, "no archive of 'acdc': expected one of autosam_acdc"),
        ({"bundle": "phantom_encoder"}, "no archive of 'phantom_encoder': expected one of autosam_acdc"),
        ({"bundle": "unet_acdc", "model_type": "vit_b"}, "unet has no encoder for vit_b: expected one of autosam"),
    ],
)
def test_unknown_choices_are_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(str(tmp_path / "dist"), **options)
    assert not (tmp_path / "dist").exists()


def test_links_and_large_files_are_refused(tmp_path):
    root = tmp_path / "mine"
    root.mkdir()
    (root / "weights.pt").write_bytes(bytes(25 * 10**6 + 1))
    with pytest.raises(ValueError, match=r"weights.pt has 25.0 MB: expected at most 25 MB"):
        write_archive(root, tmp_path / "mine.zip")
    (root / "weights.pt").unlink()
    (root / "link.txt").symlink_to(root)
    with pytest.raises(ValueError, match=r"link\.txt is a symbolic link"):
        write_archive(root, tmp_path / "mine.zip")
    assert not (tmp_path / "mine.zip").exists()


def test_folder_for_the_hub_has_a_card_with_licence_and_recorded_scores(tmp_path):
    build(bundle="cnnhead_acdc", huggingface=str(tmp_path))
    (root,) = tmp_path.iterdir()
    card = huggingface_hub.ModelCard.load(root / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "monai")
    recorded = json.loads(Path(pretrained_file("cnn_head.pt")).with_name("record.json").read_text())["dice"]["cnn"]
    scores = config(root, "metadata")["eval_metrics"] | {f"Dice, {name}": value for name, value in recorded.items()}
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == scores
    assert "mean_dice_development" in scores
    assert card.text.strip().startswith("# SAM encoder with CNN head on ACDC\n\n## Use from the Hub")
    assert (root / "models/model.pt").read_bytes() == Path(pretrained_file("cnn_head.pt")).read_bytes()
    assert missing_files(root / "README.md", root) == set()
    assert "](docs/example.jpg)" in card.text
    assert "OWNER" not in card.text


def test_card_of_another_head_claims_no_scores(tmp_path):
    mine, _ = other_head("linear_head.pt", tmp_path)
    build(bundle="linearhead_acdc", model=mine, huggingface=str(tmp_path / "hub"))
    card = huggingface_hub.ModelCard.load(tmp_path / "hub/linearhead_acdc/README.md")
    assert card.data.eval_results is None


def test_a_release_without_a_folder_is_refused():
    with pytest.raises(ValueError, match="give --output_dir DIR for archives, or --huggingface DIR"):
        build()


def test_archive_is_loaded_from_anywhere_by_its_root(unpacked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = unpacked / "linearhead_acdc"
    load = partial(monai.bundle.load, root.name, bundle_dir=str(unpacked), workflow_type="inference")
    state = load(args_file={"bundle_root": str(root)}).state_dict()
    trained = torch.load(root / "models/model.pt", weights_only=True)
    assert all(torch.equal(state[key], value) for key, value in trained.items() if key.startswith("head."))


SEGMENT_AND_LOAD_ALL = """
import sys
from monai.bundle import load, run

volume, output_dir, folder, *bundles = sys.argv[1:]
root = f"{folder}/{bundles[0]}"
sys.path.insert(0, root)
run("inferring", config_file=f"{root}/configs/inference.json", bundle_root=root, dataset_dir=volume,
    output_dir=output_dir)
for bundle in bundles:
    load(bundle, bundle_dir=folder, workflow_type="inference", args_file={"bundle_root": f"{folder}/{bundle}"})
import components
from components.pretrained import pretrained_file
print(components.__file__)
print(pretrained_file("phantom_unet.pth"))
"""


def test_one_process_segments_and_loads_several_archives_by_the_components_of_the_first(unpacked, tmp_path):
    voxels = np.random.RandomState(0).rand(60, 48, 2).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "case.nii.gz")
    arguments = (tmp_path / "case.nii.gz", tmp_path / "out", unpacked, "linearhead_acdc", "unet_acdc")
    command = [sys.executable, "-c", SEGMENT_AND_LOAD_ALL, *map(str, arguments)]
    said = succeeds(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False))
    assert f"{unpacked}/linearhead_acdc/components/__init__.py" in said
    assert f"{unpacked}/linearhead_acdc/components/pretrained/phantom_unet.pth" in said
    assert nib.load(tmp_path / "out/case_pred.nii.gz").shape == (60, 48, 2)
