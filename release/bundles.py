"""The content of an archive: a bundle's folder, a copy of `components` with its weights, and a trained model."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

import components
from adapt.template import KNOBS_LINK, SHIPPED_ENCODER, Instance, knob_meanings, networks, readme_table, with_values
from autosam.folders import DATA_FILE, MODEL
from autosam.folders import SHIPPED as BUNDLES
from components.sam.encoders import SHIPPED as SHIPPED_ENCODERS
from release.archives import FILE_LIMIT

REPOSITORY = Path(__file__).parents[1]
TESTED = REPOSITORY / "constraints.txt"
PACKED = tuple(f"{network}_acdc" for network in networks())  # they segment without training
PICTURE = "docs/example.jpg"
ENCODER_KNOB = "sam_checkpoint"
_EXAMPLE = f"""\
![Slices of a synthetic patient from base to apex, with truth and prediction]({Path(PICTURE).name})

*A synthetic patient, segmented by the model that comes with the package.*

"""
_PINNED_APART = {"monai": "monai", "torch": "pytorch", "numpy": "numpy"}  # package: its key in metadata.json


def check_release_facts() -> None:
    """Check that every bundle has the package's version, a changelog line of it, and pins of the tested packages.

    Raises:
        ValueError: if a bundle has not; the message names it and what it should have.
    """
    for path in sorted(BUNDLES.glob("*/configs/metadata.json")):
        bundle = path.parents[1]
        if own_bundle(bundle):  # not part of a release
            continue
        version = _metadata(bundle)["version"]
        if version != components.__version__:
            raise ValueError(
                f"metadata.json of {bundle.name} has version {version}: expected {components.__version__}, which "
                "components/__init__.py gives, and a line of that version in its changelog"
            )
        _check_metadata(bundle)


def _check_metadata(bundle: Path) -> None:
    """Check that a bundle's changelog has a line of its version, and that it pins the tested packages."""
    metadata = _metadata(bundle)
    if metadata["version"] not in metadata["changelog"]:
        raise ValueError(
            f"metadata.json of {bundle.name} has version {metadata['version']}: expected a line of that version in its "
            "changelog"
        )
    for package, version in pins_of(metadata).items() if TESTED.is_file() else ():  # a wheel's are tested before
        if version != _tested_versions().get(package):
            raise ValueError(
                f"metadata.json of {bundle.name} pins {package} {version}: expected {_tested_versions().get(package)}, "
                "which constraints.txt gives as tested"
            )


def pins_of(metadata: dict[str, Any]) -> dict[str, str]:
    """Return the versions of the packages that a bundle's metadata name, by package."""
    apart = {package: metadata[f"{key}_version"] for package, key in _PINNED_APART.items()}
    return apart | metadata["required_packages_version"]


def _metadata(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "configs/metadata.json").read_text())


@functools.cache
def _tested_versions() -> dict[str, str]:
    lines = TESTED.read_text()
    return dict(re.findall(r"^([\w-]+)==(\S+)$", lines, flags=re.MULTILINE))


def own_bundle(bundle: str | Path) -> Path | None:
    """Return the folder of a bundle for a user's own data, by folder or by name in `bundles`; None for others."""
    folders = (Path(bundle), BUNDLES / bundle)
    return next((folder.resolve() for folder in folders if (folder / DATA_FILE).is_file()), None)


def assemble(bundle: str, folder: Path, *, model_type: str = SHIPPED_ENCODER, model: str | None = None) -> Path:
    """Write a bundle's folder with all that it needs, except an encoder that is not in the package.

    The names of a user's own cases stay in `data.json`; the path of their folder is removed.

    Args:
        bundle: name of a bundle for ACDC, or the folder of one for a user's own data.
        folder: an empty folder to write to.
        model_type: for ACDC another encoder than the shipped one: `vit_b`, `vit_l`, `vit_h` or `vit_t`.
        model: the trained `model.pt` to include; None for the bundle's own, or for ACDC the package's.

    Returns:
        the bundle's folder below `folder`, named after the model type unless that is the shipped one.

    Raises:
        FileNotFoundError: if a bundle for a user's own data has not been trained, or a file is missing.
        ValueError: if the bundle has no archive, or its metadata are not those of a release.
        RuntimeError: from MONAI, around the reason why a model does not fit its configs.
    """
    own = own_bundle(bundle)
    source = own or BUNDLES / bundle
    if own and model_type != SHIPPED_ENCODER:
        raise ValueError(f"{source} has its own encoder: expected no model_type; make another bundle with autosam new")
    if own:
        _check_metadata(source)
    elif bundle not in PACKED:
        raise ValueError(
            f"no archive of {bundle!r}: expected one of {', '.join(PACKED)}, or the folder of a bundle that "
            "`autosam new` has made"
        )
    if model_type == SHIPPED_ENCODER:
        root = folder / source.name
        _copy_bundle(source, root)
    else:
        root = folder / f"{source.name}_{model_type}"
        Instance(bundle.removesuffix("_acdc"), cases="acdc", hearts=True, model_type=model_type).write(root)
    _copy_components(root)
    if not own:
        _explain_knobs(root)
    if own or model:
        _put_in(root, source, Path(model or source / MODEL))
        if not own:  # the scores are those of the package's model
            set_values(root / "configs/metadata.json", {"eval_metrics": {}})
    elif start := weights_of(root).get("start_checkpoint"):
        _copy(start, root / MODEL)
        _add_picture(root, picture_of(bundle))
    if own:
        set_values(root / DATA_FILE, {"dataset_dir": ""})
    return root


def weights_of(bundle: Path) -> dict[str, Path]:
    """Return the files that a bundle's training reads, by knob: `start_checkpoint` and `sam_checkpoint`, if any."""
    parser = ConfigParser()
    parser.read_config(bundle / "configs/train.json")
    parser["bundle_root"] = str(bundle)
    found = {knob: parser.get_parsed_content(knob) for knob in ("start_checkpoint", ENCODER_KNOB) if knob in parser}
    return {knob: Path(file) for knob, file in found.items() if file}


def take_encoder_along(root: Path, url: str) -> None:
    """Put a user's own encoder into an archive, or its address and hash if it is large.

    Args:
        root: the bundle's folder, as `assemble` has written it.
        url: address of the file, if it is larger than an archive's files may be.

    Raises:
        ValueError: if such a file has no address.
    """
    if not isinstance(json.loads((root / "configs/train.json").read_text()).get(ENCODER_KNOB), str):
        return  # it comes with the package, or large_files.yml says where it is published
    path = weights_of(root)[ENCODER_KNOB]
    suffix = path.suffix if path.suffix == ".safetensors" else ".pth"  # MONAI Label treats any *.pt there as a model
    place = f"models/{path.stem}{suffix}"
    if path.stat().st_size <= FILE_LIMIT:
        _copy(path, root / place)
    elif url:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        entry = {"path": place, "url": url, "hash_val": digest, "hash_type": "sha256"}
        (root / "large_files.yml").write_text(yaml.safe_dump({"large_files": [entry]}, sort_keys=False))
    else:
        raise ValueError(
            f"{path} has {path.stat().st_size / 1e6:.0f} MB, more than the {FILE_LIMIT / 1e6:.0f} MB of an archive's "
            "file: expected an address from which it is downloaded; give --encoder_url URL"
        )
    set_encoder(root, f"$@bundle_root + '/{place}'")


def set_encoder(root: Path, file: str) -> None:
    """Set the encoder's file in a bundle's configs."""
    for name in ("train", "inference"):
        set_values(root / f"configs/{name}.json", {ENCODER_KNOB: file})


def set_values(config: Path, values: dict[str, Any]) -> None:
    """Set top-level keys of a config."""
    config.write_text(with_values(config.read_text(), values))


def _copy_bundle(source: Path, root: Path) -> None:
    """Copy a bundle's files, without files of editors and outputs of runs."""
    is_shipped = json.loads((source / "configs/train.json").read_text()).get("model_type") in SHIPPED_ENCODERS
    encoder = () if is_shipped else ("large_files.yml",)  # else the zoo would download SAM's file without need
    patterns = ("LICENSE", *encoder, "configs/[!.]*", "docs/[!.]*")
    for path in (path for pattern in patterns for path in source.glob(pattern) if path.is_file()):
        _copy(path, root / path.relative_to(source))


def _copy_components(root: Path) -> None:
    """Copy `components` with all its weights: a host imports one bundle's copy and uses it for all bundles."""
    for path in (REPOSITORY / "components").rglob("*"):
        if path.suffix in (".py", ".json", ".pt", ".pth"):
            _copy(path, root / path.relative_to(REPOSITORY))


def _explain_knobs(root: Path) -> None:
    """Put the table of knobs into the README of an ACDC bundle, whose link leads out of the archive."""
    readme = root / "docs/README.md"
    table = readme_table(json.loads((root / "configs/train.json").read_text()), "train", knob_meanings())
    readme.write_text(readme.read_text().replace(KNOBS_LINK, table))


def picture_of(bundle: str) -> Path:
    """Return where the picture for a bundle's card is kept; `release.picture` draws it."""
    return REPOSITORY / f"release/pictures/{bundle}.jpg"


def _add_picture(root: Path, picture: Path) -> None:
    """Show what the package's model makes of a synthetic patient, in the README before the section on data."""
    if not picture.is_file():
        raise FileNotFoundError(
            f"there is no picture {picture} for the card: draw it by `python -m release --pictures`"
        )
    _copy(picture, root / PICTURE)
    readme = root / "docs/README.md"
    overview, heading, rest = readme.read_text().partition("## Data\n")
    readme.write_text(f"{overview}{_EXAMPLE}{heading}{rest}")


def _put_in(root: Path, source: Path, model: Path) -> None:
    """Copy a trained model into the archive, after loading it with the bundle's configs."""
    if not model.is_file():
        raise FileNotFoundError(f"there is no model {model}: run training in {source} first, or give --model FILE")
    parser = ConfigParser()
    parser.read_config(root / "configs/inference.json")
    classes = _metadata(root)["network_data_format"]["outputs"]["pred"]["num_channels"]
    parser.update({"bundle_root": str(source), "ckpt_path": str(model), "out_channels": classes})
    parser["network_def"]["start_checkpoint"] = str(model)
    parser.get_parsed_content("network_def")
    _copy(model, root / MODEL)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
