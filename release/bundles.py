"""What an archive holds: a bundle's files, a copy of `components`, and the weights it segments with."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

import components
from bundles.derive import edited, read_entries
from components.evaluation.quality import CALIBRATION
from components.pretrained import pretrained_file
from components.sam.checkpoint import CHECKPOINT_FILES
from release.texts import replaced, with_defaults, with_section

REPOSITORY = Path(__file__).parents[1]
BUNDLES = REPOSITORY / "bundles"
TINY = "phantom_unet"
_ENTRIES = read_entries()
# Each head's bundle, with the name of its head among the pretrained files, None for a head that has none there.
HEADS = {bundle: head.get("tiny", {}).get("pretrained") for bundle, head in _ENTRIES["heads"].items()}
_BASELINES = {bundle: entry.get("tiny", {}).get("pretrained") for bundle, entry in _ENTRIES["baselines"].items()}
COMPLETE = {**HEADS, **{bundle: name for bundle, name in _BASELINES.items() if name}}  # segment as they are packed

_PINNED_APART = {"monai": "monai", "torch": "pytorch", "numpy": "numpy"}  # package: its key in metadata.json
_CONFIGS_BESIDE_TINY = ("tiny.json", "demo.json")  # overlays that an archive has merged, or has no weights for
_ENCODER = "phantom_unet.pth"
MODEL = "models/model.pt"
DATA_FILE = "configs/data.json"  # which only bundles for one's own data have
_RECORD = "phantom_encoder.json"
_META = "https://dl.fbaipublicfiles.com/segment_anything"
_ADDRESSES = {
    "vit_b": _META,
    "vit_l": _META,
    "vit_h": _META,
    "vit_t": "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/master/weights",
}
# Source: micro-sam's registry of Meta's files, https://github.com/computational-cell-analytics/micro-sam; MobileSAM's
# (40,728,226 bytes, Apache-2.0) is the one by which several projects pin that file.
_SHA256 = {
    "vit_b": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "vit_l": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "vit_h": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    "vit_t": "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
}


def check_release_facts() -> None:
    """Check that every bundle has the package's version, with a line of its changelog, and pins the tested packages.

    Raises:
        ValueError: naming the bundle that has not, and what it should have.
    """
    for path in sorted(BUNDLES.glob("*/configs/metadata.json")):
        bundle = path.parents[1]
        if own_bundle(bundle):  # that is no part of a release
            continue
        version = _metadata(bundle)["version"]
        if version != components.__version__:
            raise ValueError(
                f"metadata.json of {bundle.name} has version {version}: expected {components.__version__}, which "
                "components/__init__.py gives, and a line of that version in its changelog"
            )
        _check_metadata(bundle)


def _check_metadata(bundle: Path) -> None:
    """Check that a bundle's version has a line of its changelog, and that it pins the tested packages."""
    metadata = _metadata(bundle)
    if metadata["version"] not in metadata["changelog"]:
        raise ValueError(
            f"metadata.json of {bundle.name} has version {metadata['version']}: expected a line of that version in its "
            "changelog"
        )
    for package, version in pins_of(metadata).items():
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


def own_bundle(bundle: str | Path) -> Path | None:
    """Return the folder of a bundle that `python -m adapt new` has written.

    Args:
        bundle: its folder, or the name of one in `bundles`.

    Returns:
        the folder, None for another bundle.
    """
    folders = (Path(bundle), BUNDLES / bundle)
    return next((folder.resolve() for folder in folders if (folder / DATA_FILE).is_file()), None)


@functools.cache
def _tested_versions() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text()
    return dict(re.findall(r"^([\w-]+)==(\S+)$", lines, flags=re.MULTILINE))


def bundles_of(model_type: str, bundle: str | None = None) -> list[str]:
    """List the bundles of which there are archives with an encoder.

    Args:
        model_type: `phantom_unet`, `vit_b`, `vit_l`, `vit_h` or `vit_t`.
        bundle: this one only.

    Returns:
        their names.

    Raises:
        ValueError: for another model type, or a bundle that has no such archive.
    """
    if model_type not in (TINY, *CHECKPOINT_FILES):
        raise ValueError(f"unknown model_type {model_type!r}: expected one of {TINY}, {', '.join(CHECKPOINT_FILES)}")
    names = list(COMPLETE) if model_type == TINY else list(HEADS)
    if bundle is not None and bundle not in names:
        raise ValueError(
            f"no archive of {bundle!r} with {model_type}: expected one of {', '.join(names)}, or, without model_type, "
            "the folder of a bundle that `python -m adapt new` has made"
        )
    return names if bundle is None else [bundle]


def assemble(
    bundle: str, folder: Path, *, model_type: str = TINY, head: str | None = None, sam_checkpoint: str | None = None
) -> Path:
    """Write what an archive holds.

    Args:
        bundle: name of its folder in this repository.
        folder: where to write, empty.
        model_type: as in `bundles_of`.
        head: a trained `model.pt` to put in, or None; with `phantom_unet` then the one trained on phantoms.
        sam_checkpoint: of the encoder that `head` was trained on, needed for another model type than `phantom_unet`.

    Returns:
        the bundle's folder below `folder`, named after the model type unless that is `phantom_unet`.

    Raises:
        ValueError: when the head does not fit the encoder, or `sam_checkpoint` is missing.
    """
    root = folder / (bundle if model_type == TINY else f"{bundle}_{model_type}")
    _copy_sources(BUNDLES / bundle, root)
    if model_type == TINY:
        _complete(root, bundle)
    else:
        _leave_sam_to_be_downloaded(root, model_type)
    if head is not None:
        _put_in(root, head, sam_checkpoint=(sam_checkpoint or root / "models" / _ENCODER) if bundle in HEADS else None)
    return root


def assemble_own(source: Path, folder: Path) -> Path:
    """Write what an archive of a bundle for one's own data holds: with the model that it has trained.

    `data.json` keeps the names of the cases, by which anyone who has the data can train and evaluate as its owner did;
    `dataset_dir`, where they lie on this computer, is left out.

    Args:
        source: folder that `python -m adapt new` has written, see `own_bundle`.
        folder: where to write, empty.

    Returns:
        the bundle's folder below `folder`.

    Raises:
        FileNotFoundError: when it has not been trained.
        ValueError: when its metadata are not those of a release, or its model does not fit its configs.
    """
    model = source / MODEL
    if not model.is_file():
        raise FileNotFoundError(
            f"there is no {model}: expected a trained bundle; run training in {source} first, see its docs/README.md"
        )
    _check_metadata(source)
    root = folder / source.name
    _copy_sources(source, root)
    _set_knobs(root / DATA_FILE, {"dataset_dir": ""})
    _take_start_along(root)
    _put_in(root, str(model), sam_checkpoint=None)
    return root


def _take_start_along(root: Path) -> None:
    """Put the weights of the package from which a bundle for pictures starts into it, since it comes without them."""
    train = root / "configs/train.json"
    start = json.loads(train.read_text())["start_checkpoint"]
    if not isinstance(start, dict):  # a file of the user's, or none
        return
    file = None
    if json.loads((root / DATA_FILE).read_text())["pictures"]:
        _copy(Path(pretrained_file(start["name"])), root / "models" / start["name"])
        file = f"$@bundle_root + '/models/{start['name']}'"
    _set_knobs(train, {"start_checkpoint": file})


def _copy_sources(source: Path, root: Path) -> None:
    """Copy a bundle's license, configs and documents, and `components`, without what an editor has left among them."""
    for path in sorted([source / "LICENSE", *source.glob("configs/[!.]*"), *source.glob("docs/[!.]*")]):
        if path.name not in _CONFIGS_BESIDE_TINY and path.is_file():
            _copy(path, root / path.relative_to(source))
    for path in sorted([*(REPOSITORY / "components").rglob("*.py"), CALIBRATION]):
        if path.parent.name != "pretrained":
            _copy(path, root / path.relative_to(REPOSITORY))


def _complete(root: Path, bundle: str) -> None:
    """Put weights trained on phantoms into a bundle, a head's on the tiny encoder, and tiny.json into its configs."""
    files = _copy_weights(root, bundle)
    knobs = json.loads((BUNDLES / bundle / "configs/tiny.json").read_text())
    del knobs["_desc_"]
    knobs |= {name: f"$@bundle_root + '/{file}'" for name, file in files.items()}
    inference = json.loads((root / "configs/inference.json").read_text())
    of_inference = {}
    for name, value in knobs.items():
        if name in inference["as_trained"]["given"]:  # null, so that it follows whatever becomes the bundle's model
            of_inference[f"as_trained#otherwise#{name}"] = value  # `monai.bundle.load` from elsewhere finds no model
        elif name in inference:
            of_inference[name] = value
    of_inference["ckpt_path"] = f"$@bundle_root + '/{MODEL}'"
    _set_knobs(root / "configs/inference.json", of_inference)
    train = json.loads((root / "configs/train.json").read_text())
    of_overlay = {name: knobs.pop(name) for name in tuple(knobs) if name not in train}
    _set_knobs(root / "configs/train.json", knobs, before={"epochs": of_overlay})

    readme = (root / "docs/README.md").read_text()
    readme = with_defaults(readme, {name: str(files.get(name, _as_json(value))) for name, value in knobs.items()})
    readme = replaced(readme, r"\[2,3,256,256\]", "[2,3,{0},{0}]".format(knobs["crop_size"]))
    if bundle in HEADS:
        readme = with_section(readme, "The tiny encoder", _TINY_SECTION)
        readme = with_section(readme, "Performance", _performance(COMPLETE[bundle]))
        readme = replaced(readme, r"^# SAM's checkpoint, once\n.*?\n\n", "")
    else:
        readme = with_section(readme, "The UNet from phantoms", _BASELINE_SECTION)
    (root / "docs/README.md").write_text(readme)
    addition, what = ("tiny encoder", "a tiny one") if bundle in HEADS else ("from phantoms", "from weights")
    _rename(root, addition, f"; here {what}, trained on synthetic slices only, which comes with the bundle")


def _copy_weights(root: Path, bundle: str) -> dict[str, str]:
    """Copy what comes with a bundle; return the knobs that name its files, with paths below the bundle."""
    files = {}
    if bundle in HEADS:
        _copy(Path(pretrained_file(_ENCODER)), root / "models" / _ENCODER)
        _copy(Path(pretrained_file(_ENCODER)).with_name("record.json"), root / "docs" / _RECORD)
        files["sam_checkpoint"] = f"models/{_ENCODER}"
    if pretrained := COMPLETE[bundle]:
        # longer than model.pt: MONAI Label takes the shortest name for the model
        start = f"models/{Path(pretrained).stem}_from_phantoms.pt"
        for file in (start, MODEL):
            _copy(Path(pretrained_file(pretrained)), root / file)
        files["head_checkpoint" if bundle in HEADS else "start_checkpoint"] = start
    return files


def _performance(pretrained: str | None) -> str:
    """Return the section on a head's scores as it comes."""
    if pretrained is None:
        return "## Performance\n\nThe archive comes without a trained head: train one first.\n"
    dice = json.loads(Path(pretrained_file(_ENCODER)).with_name("record.json").read_text())["dice"]
    return _TINY_PERFORMANCE.format(**dice[Path(pretrained).stem.removesuffix("_head")])


def _leave_sam_to_be_downloaded(root: Path, model_type: str) -> None:
    """Point a bundle to SAM's own weights."""
    entry = {
        "path": f"models/{CHECKPOINT_FILES[model_type]}",
        "url": f"{_ADDRESSES[model_type]}/{CHECKPOINT_FILES[model_type]}",
        "hash_val": _SHA256[model_type],
        "hash_type": "sha256",
    }
    (root / "large_files.yml").write_text(yaml.safe_dump({"large_files": [entry]}, sort_keys=False))
    for name in ("train", "inference"):
        _set_knobs(root / f"configs/{name}.json", {"model_type": model_type})
    _rename(root, f"SAM {model_type}", f", {model_type}")

    defaults = {"model_type": model_type, "sam_checkpoint": entry["path"]}
    readme = with_defaults((root / "docs/README.md").read_text(), defaults)
    (root / "docs/README.md").write_text(with_section(readme, "The tiny encoder", ""))


def _put_in(root: Path, head: str, *, sam_checkpoint: str | Path | None) -> None:
    """Make a head the bundle's model, once it has been loaded on the encoder that it was trained on, or a UNet."""
    if sam_checkpoint is not None and not Path(sam_checkpoint).is_file():
        raise ValueError(
            "a head is checked against its encoder: expected SAM's checkpoint that it was trained on, received "
            f"{sam_checkpoint}; give --sam_checkpoint FILE"
        )
    parser = ConfigParser()
    parser.read_config(root / "configs/inference.json")
    parser.update({"bundle_root": str(root), "ckpt_path": head})
    if sam_checkpoint is None:
        parser.update({"network_def#start_checkpoint": head})
    else:
        parser.update({"sam_checkpoint": str(sam_checkpoint), "network_def#head_checkpoint": head})
    parser.get_parsed_content("network_def")
    _copy(Path(head), root / MODEL)


def _rename(root: Path, addition: str, description: str) -> None:
    """Say in name, description and README on what encoder an archive stands."""
    metadata = json.loads((root / "configs/metadata.json").read_text())
    name = {"name": f"{metadata['name']}, {addition}", "description": f"{metadata['description']}{description}"}
    _set_knobs(root / "configs/metadata.json", name)
    title, _, rest = (root / "docs/README.md").read_text().partition("\n")
    (root / "docs/README.md").write_text(f"{title}, {addition}\n{rest}")


def _set_knobs(path: Path, knobs: Mapping[str, Any], before: Mapping[str, dict[str, Any]] | None = None) -> None:
    path.write_text(edited(path.read_text(), replace=knobs, add=before))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _as_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


_TINY_SECTION = """\
## The tiny encoder

The archive is complete. Its encoder, `models/phantom_unet.pth`, follows SAM's contract and checkpoint layout with 2.1M
weights; it and the head, `models/model.pt`, were trained on synthetic short-axis slices only, as
`docs/phantom_encoder.json` records. No patient, labelled or not, went into them.

Training starts from that head, kept as `models/*_from_phantoms.pt`, with synthetic slices in each batch, so that it
keeps what it knew, and replaces `models/model.pt`. `--head_checkpoint '$None' --epochs 120 --learning_rate 0.0005`
trains a fresh head; other classes than RV, Myo and LV need that, and `--phantom_share 0 --test_time_views 1`.
"""
_TINY_PERFORMANCE = """\
## Performance

As it comes, on synthetic slices that it has not seen: mean Dice {mean:.2f} (RV {RV:.2f}, Myo {Myo:.2f}, LV {LV:.2f}).
These are drawn harder than patients are: the figure says that training worked, and nothing about patients.
"""
_BASELINE_SECTION = """\
## The UNet from phantoms

The archive is complete. Its network, `models/model.pt`, has 1.9M weights and was trained on synthetic short-axis slices
only. No patient, labelled or not, went into it.

Training starts from it, kept as `models/unet_from_phantoms.pt`, with synthetic slices in each batch, so that it keeps
what it knew, and replaces `models/model.pt`. Other classes than RV, Myo and LV need
`--start_checkpoint '$None' --phantom_share 0 --steps 1000`.
"""
