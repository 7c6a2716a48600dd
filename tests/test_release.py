"""Archives of the bundles: what they hold, that they are reproducible, and that they work where they are unpacked."""

import hashlib
import json
import re
import shutil
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
from conftest import REPOSITORY, messages_of, run_monai_bundle, succeeds
from monai.bundle import verify_metadata

import components
from components.pretrained import pretrained_file
from components.sam.checkpoint import CHECKPOINT_FILES
from release import bundles
from release.__main__ import build
from release.archives import write_archive, write_model_info
from release.bundles import COMPLETE, HEADS, check_release_facts
from release.texts import with_defaults, with_section

VERSION = components.__version__


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The archives with the tiny encoder inside."""
    folder = tmp_path_factory.mktemp("dist")
    build(str(folder))
    return folder


@pytest.fixture(scope="module")
def unpacked(dist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    for archive in dist.glob("*.zip"):
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    return folder


def entries(archive: Path) -> dict[str, int]:
    with zipfile.ZipFile(archive) as file:
        return {entry.filename: entry.file_size for entry in file.infolist()}


def config(root: Path, name: str) -> dict:
    return json.loads((root / f"configs/{name}.json").read_text())


def test_every_bundle_has_an_archive_in_the_zoos_layout(dist):
    assert {path.name for path in dist.iterdir()} == {
        *(f"{bundle}_v{VERSION}.zip" for bundle in COMPLETE),
        "model_info.json",
    }
    for bundle in COMPLETE:
        files = entries(dist / f"{bundle}_v{VERSION}.zip")
        expected = {"LICENSE", "configs/metadata.json", "configs/train.json", "configs/logging.conf", "docs/README.md"}
        assert {f"{bundle}/{name}" for name in (*expected, "docs/data_license.txt")} <= files.keys()
        assert all(name.startswith(f"{bundle}/") for name in files)
        assert max(files.values()) <= 25e6
        sources = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "components").rglob("*.py")}
        packed = {name.removeprefix(f"{bundle}/") for name in files if "/components/" in name}
        assert packed == {
            *(name for name in sources if "pretrained" not in name),
            "components/evaluation/predicted_dice.json",
        }


def test_model_info_points_to_the_archives(dist):
    info = json.loads((dist / "model_info.json").read_text())
    assert info.keys() == {f"{bundle}_v{VERSION}" for bundle in COMPLETE}
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


@pytest.mark.parametrize("bundle", COMPLETE)
def test_archive_has_the_overlay_merged_and_the_weights_inside(bundle, unpacked):
    root = unpacked / bundle
    tiny = json.loads((REPOSITORY / "bundles" / bundle / "configs/tiny.json").read_text())
    del tiny["_desc_"]
    start, encoder = f"{Path(COMPLETE[bundle]).stem}_from_phantoms.pt", set()
    if bundle in HEADS:
        encoder = {"phantom_unet.pth"}
        tiny["sam_checkpoint"] = "$@bundle_root + '/models/phantom_unet.pth'"
    tiny["head_checkpoint" if bundle in HEADS else "start_checkpoint"] = f"$@bundle_root + '/models/{start}'"
    for name in ("train", "inference"):
        source = json.loads((REPOSITORY / "bundles" / bundle / f"configs/{name}.json").read_text())
        given = {"ckpt_path": "$@bundle_root + '/models/model.pt'"} if name == "inference" else {}
        left_out = set()
        if name == "inference":  # what is of training, and what follows the model
            left_out = {
                "epochs",
                "steps",
                "val_interval",
                "learning_rate",
                "phantom_share",
                *source["as_trained"]["given"],
            }
            otherwise = source["as_trained"]["otherwise"]  # for whoever loads the archive where its model is not found
            otherwise |= {name: value for name, value in tiny.items() if name in source["as_trained"]["given"]}
        assert config(root, name) == source | {k: v for k, v in tiny.items() if k not in left_out} | given
    assert {path.name for path in (root / "models").iterdir()} == {"model.pt", start} | encoder
    assert (root / "models/model.pt").read_bytes() == Path(pretrained_file(COMPLETE[bundle])).read_bytes()
    assert min((root / "models").glob("*.pt"), key=lambda path: len(path.name)).name == "model.pt"
    assert not (root / "large_files.yml").exists()


@pytest.mark.parametrize("bundle", COMPLETE)
def test_metadata_of_archives_follow_the_schema(bundle, unpacked, metadata_schema):
    path = unpacked / bundle / "configs/metadata.json"
    verify_metadata(meta_file=str(path), filepath=metadata_schema, create_dir=False)
    assert ("tiny encoder" in json.loads(path.read_text())["name"]) == (bundle in HEADS)


@pytest.mark.parametrize("bundle", COMPLETE)
def test_readme_of_an_archive_names_its_own_defaults_and_no_overlay(bundle, unpacked):
    readme = (unpacked / bundle / "docs/README.md").read_text()
    train = config(unpacked / bundle, "train")
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", readme, flags=re.MULTILINE))
    assert {name: rows[name] for name in ("crop_size", "test_time_views")} == {
        name: str(train[name]) for name in ("crop_size", "test_time_views")
    }
    assert "tiny.json" not in readme
    assert "download_large_files" not in readme
    for target in re.findall(r"configs/\w+\.json", readme):
        assert (unpacked / bundle / target).is_file(), target


def test_unpacked_archive_segments(unpacked, tmp_path):
    root = unpacked / "linearhead_acdc"
    voxels = np.random.RandomState(0).rand(60, 48, 2).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "case.nii.gz")
    command = ("run", "inferring", "--config_file", "configs/inference.json", "--output_dir", str(tmp_path / "out"))
    succeeds(run_monai_bundle(*command, "--dataset_dir", str(tmp_path / "case.nii.gz"), cwd=root))
    assert nib.load(tmp_path / "out/case_pred.nii.gz").shape == (60, 48, 2)


@pytest.mark.parametrize("model_type", CHECKPOINT_FILES)
def test_archive_without_weights_says_where_sams_are(model_type, tmp_path):
    build(str(tmp_path), model_type=model_type, bundle="autosam_acdc")
    name = f"autosam_acdc_{model_type}"
    with zipfile.ZipFile(tmp_path / f"{name}_v{VERSION}.zip") as file:
        file.extractall(tmp_path)
    root = tmp_path / name
    (entry,) = yaml.safe_load((root / "large_files.yml").read_text())["large_files"]
    assert entry["path"] == f"models/{CHECKPOINT_FILES[model_type]}"
    assert entry["url"].endswith(CHECKPOINT_FILES[model_type])
    assert re.fullmatch(r"[0-9a-f]{64}", entry["hash_val"])
    assert config(root, "train")["model_type"] == config(root, "inference")["model_type"] == model_type
    assert not (root / "models").exists()
    assert not (root / "configs/tiny.json").exists()


def test_checksum_of_vit_b_is_the_one_that_the_bundle_downloads_by(tmp_path):
    build(str(tmp_path), model_type="vit_b", bundle="autosam_acdc")
    with zipfile.ZipFile(tmp_path / f"autosam_acdc_vit_b_v{VERSION}.zip") as file:
        packed = yaml.safe_load(file.read("autosam_acdc_vit_b/large_files.yml"))
    assert packed == yaml.safe_load((REPOSITORY / "bundles/autosam_acdc/large_files.yml").read_text())


def test_trained_head_goes_into_the_archive_of_its_encoder_only(tmp_path):
    state = torch.load(pretrained_file("linear_head.pt"), weights_only=True)
    next(value for key, value in state.items() if key.endswith("bias")).add_(1)
    torch.save(state, tmp_path / "mine.pt")
    build(str(tmp_path), bundle="linearhead_acdc", head=str(tmp_path / "mine.pt"))
    with zipfile.ZipFile(tmp_path / f"linearhead_acdc_v{VERSION}.zip") as file:
        assert file.read("linearhead_acdc/models/model.pt") == (tmp_path / "mine.pt").read_bytes()
    state["encoder.fingerprint"] = state["encoder.fingerprint"].flip(0)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(Exception) as caught:  # MONAI wraps a component's error in one of its own
        build(str(tmp_path / "none"), bundle="linearhead_acdc", head=str(tmp_path / "other.pt"))
    assert "that the head was trained with" in messages_of(caught.value)
    assert not (tmp_path / "none").exists()


def test_head_needs_its_bundle_and_its_encoder(tmp_path):
    head = pretrained_file("linear_head.pt")
    with pytest.raises(ValueError, match=r"say which of .* with --bundle"):
        build(str(tmp_path), head=head)
    with pytest.raises(ValueError, match="give --sam_checkpoint FILE"):
        build(str(tmp_path), model_type="vit_b", bundle="linearhead_acdc", head=head)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "vit_x"}, "unknown model_type 'vit_x': expected one of phantom_unet, vit_b"),
        ({"bundle": "acdc"}, "no archive of 'acdc' with phantom_unet: expected one of autosam_acdc"),
        (
            {"bundle": "phantom_encoder"},
            "no archive of 'phantom_encoder' with phantom_unet: expected one of autosam_acdc",
        ),
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


def test_text_edits_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="expected one place"):
        with_defaults("| `a` | `1` | meaning |\n", {"c": "1"})
    with pytest.raises(ValueError, match="expected one place"):
        with_section("## One\ntext\n## Two\n", "Three", "")


def test_folder_for_the_hub_has_a_card_with_licence_and_recorded_scores(tmp_path):
    build(bundle="cnnhead_acdc", huggingface=str(tmp_path))
    (root,) = tmp_path.iterdir()
    card = huggingface_hub.ModelCard.load(root / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "monai")
    recorded = json.loads(Path(pretrained_file("cnn_head.pt")).with_name("record.json").read_text())["dice"]["cnn"]
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        f"Dice, {name}": value for name, value in recorded.items()
    }
    assert card.text.strip().startswith("# SAM encoder with CNN head on ACDC, tiny encoder\n\n## Use from the Hub")
    assert (root / "models/model.pt").read_bytes() == Path(pretrained_file("cnn_head.pt")).read_bytes()
    assert (root / "configs/metadata.json").is_file()


def test_card_of_another_head_claims_no_scores(tmp_path):
    state = torch.load(pretrained_file("linear_head.pt"), weights_only=True)
    next(value for key, value in state.items() if key.endswith("bias")).add_(1)
    torch.save(state, tmp_path / "mine.pt")
    build(bundle="linearhead_acdc", head=str(tmp_path / "mine.pt"), huggingface=str(tmp_path / "hub"))
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
    with pytest.raises(Exception) as caught:  # MONAI wraps a component's error in one of its own
        load()
    assert f"no SAM checkpoint at {tmp_path}/models/phantom_unet.pth" in messages_of(caught.value)
    assert "args_file={'bundle_root': FOLDER}" in messages_of(caught.value)
