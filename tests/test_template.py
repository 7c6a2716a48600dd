"""How bundles are instances of one template, and that a head is added by a class, a line and a block."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import monai.bundle
import nibabel as nib
import pytest
import torch
from conftest import REPOSITORY, succeeds
from monai.bundle import ConfigParser, ReferenceResolver

from adapt import template
from adapt.new import acdc_bundles
from adapt.template import (
    KNOBS_LINK,
    SHIPPED_ENCODER,
    Instance,
    as_text,
    encoders,
    knobs_page,
    networks,
    readme_table,
    with_values,
)
from components.networks import heads
from components.phantom.dataset import write_phantom_dataset

HEADS = [name for name, network in networks().items() if network["kind"] == "encoder"]
KINDS = {"acdc": ("acdc", True), "hearts": ("custom", True), "any": ("custom", False)}
INSTANCES = [(network, kind, SHIPPED_ENCODER) for network in networks() for kind in KINDS]
INSTANCES += [(head, kind, "vit_b") for head in HEADS for kind in KINDS]
CHANGED, MISSING, PAGE = "bundles/cnnhead_acdc/configs/train.json", "bundles/unet_acdc/LICENSE", "docs/knobs.md"
ALL_WORKFLOWS = """
import json
import sys
import monai.bundle
from release.__main__ import build

runs, packing = json.loads(sys.argv[1])
for run_id, knobs in runs.items():
    monai.bundle.run(run_id, **knobs)
build(**packing)
"""
OWN_TEXTS = {  # what `adapt.new` says of one's own data
    "title": "mine",
    "summary": ["- two volumes"],
    "version": "0.1.0",
    "changelog": {"0.1.0": "made by adapt"},
    "classes_about": "RV, Myo, LV in 3D volumes",
    "authors": "me",
    "copyright": "mine",
    "data_source": "my own",
    "data_type": "nibabel",
    "image_classes": "3D volumes",
    "label_map": "0 background, 1 RV, 2 Myo, 3 LV",
    "modality": "MR",
    "channel_def": {"0": "slice before", "1": "slice", "2": "slice after"},
    "out_channels": "4",
    "num_classes": 4,
    "class_def": {"0": "background", "1": "RV", "2": "Myo", "3": "LV"},
}
CONFIG = """{
    "_desc_": "text",

    "...knobs": null,
    "depth": 1,

    "train#handlers": [{"_target_": "a.First"}, "...handlers", "...last"],
    "about {{name}}": "...text"
}
"""


def instance(network: str, kind: str, model_type: str = SHIPPED_ENCODER) -> Instance:
    cases, hearts = KINDS[kind]
    texts = OWN_TEXTS if cases == "custom" else None
    return Instance(network, cases=cases, hearts=hearts, model_type=model_type, texts=texts)


@pytest.fixture(params=INSTANCES, ids=" ".join)
def written(request, tmp_path) -> Path:
    """The folder of an instance of the template."""
    folder = tmp_path / "bundle"
    instance(*request.param).write(folder)
    return folder


@pytest.fixture
def small_template(tmp_path, monkeypatch) -> Instance:
    """An instance in whose place of a template there is a folder of two files, which tests fill with parts."""
    made = instance("unet", "acdc")
    (tmp_path / "configs").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "configs/train.json").write_text(CONFIG)
    (tmp_path / "docs/README.md").write_text(
        "a {{name}}\n<!-- only for unet acdc -->\nb\n<!-- end -->\n<!-- knobs -->\n"
    )
    monkeypatch.setattr(template, "FOLDER", tmp_path)
    monkeypatch.setattr(made, "_meanings", dict)
    parts = {"knobs": {"width": 2}, "handlers": [{"_target_": "b.Second"}], "last": {"_target_": "c.Last"}}
    made.parts = parts | {"text": ["of", "lines"], "name": "{{inner}}", "inner": "inside"}
    return made


def test_the_bundles_are_as_the_template_gives_and_nothing_else_is_tracked():
    expected = acdc_bundles()
    differing = [path for path, text in expected.items() if not path.is_file() or path.read_text() != text]
    assert differing == [], "run `python -m adapt bundles`"
    assert REPOSITORY / "docs/knobs.md" in expected
    for network in networks():
        bundle = REPOSITORY / f"bundles/{network}_acdc"
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", str(bundle)]
        listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.split()
        there = {REPOSITORY / path for path in listed if (REPOSITORY / path).is_file()}
        assert there == {path for path in expected if path.is_relative_to(bundle)}


def spoil_bundles(root: Path) -> None:
    """Change files by hand that the command of CONTRIBUTING.md writes, and remove one."""
    for path, old, new in ((CHANGED, '"depth": 2', '"depth": 3'), (PAGE, "| `depth` |", "| `deep` |")):
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new))
    (root / MISSING).unlink()


def test_the_command_restores_what_was_changed_by_hand_and_what_is_missing(repository):
    for path in (CHANGED, MISSING):
        assert (repository / path).read_text() == (REPOSITORY / path).read_text()
    before, after = (
        re.findall(r"^\| `(\w+)` \|", (root / PAGE).read_text(), re.MULTILINE) for root in (REPOSITORY, repository)
    )
    assert after == before


def test_places_are_filled_with_entries_items_values_and_text(small_template):
    files = small_template.files()
    assert json.loads(files["configs/train.json"]) == {
        "_desc_": "text",
        "width": 2,
        "depth": 1,
        "train#handlers": [{"_target_": "a.First"}, {"_target_": "b.Second"}, {"_target_": "c.Last"}],
        "about {{name}}": ["of", "lines"],
    }
    assert files["docs/README.md"] == f"a inside\nb\n{KNOBS_LINK}\n"


def test_a_place_of_no_part_is_named(small_template):
    del small_template.parts["handlers"]
    with pytest.raises(KeyError, match="handlers"):
        small_template.files()


def test_what_is_for_other_bundles_is_left_out(small_template, tmp_path):
    (tmp_path / "configs/other.json").write_text('{"_only_for_": ["unet", "custom"], "a": 1}')
    (tmp_path / "configs/both.json").write_text('{"_only_for_": ["unet", "hearts"], "a": 1}')
    assert small_template.files().keys() == {"configs/train.json", "configs/both.json", "docs/README.md"}
    assert "_only_for_" not in small_template.files()["configs/both.json"]
    small_template.tags.remove("acdc")
    assert small_template.files()["docs/README.md"].startswith("a inside\n| knob")


def test_a_group_keeps_its_blank_line_when_its_first_place_is_empty(small_template):
    small_template.parts["knobs"] = {}
    assert '"text",\n\n    "depth": 1,\n\n    "train#handlers"' in small_template.files()["configs/train.json"]


def test_other_values_keep_the_layout():
    text = as_text({"_desc_": "text", "knob": 1, "last": None}, ["knob", "last"])
    assert '"text",\n\n    "knob": 1,\n\n    "last"' in text
    assert with_values(text, {"knob": 2}) == text.replace('"knob": 1', '"knob": 2')


def test_a_transform_stands_on_one_line_and_long_dictionaries_on_several():
    transform = {"_target_": "x" * 100, "keys": ["image", "label"]}
    assert as_text({"transforms": [transform]}).splitlines()[2] == f"        {json.dumps(transform)}"
    assert len(as_text({"transform": transform}).splitlines()) == 6


def test_unknown_networks_and_encoders_are_refused():
    with pytest.raises(
        ValueError, match="unknown network 'vgg': expected one of autosam, cnnhead, deeplabhead, linearhead, unet"
    ):
        instance("vgg", "acdc")
    with pytest.raises(
        ValueError, match="unet has no encoder for vit_b: expected one of autosam, cnnhead, deeplabhead, linearhead"
    ):
        instance("unet", "acdc", "vit_b")
    with pytest.raises(ValueError, match=r"no published encoder has model_type 'vit_x'.*give --checkpoint FILE"):
        instance("linearhead", "acdc", "vit_x")


def test_the_page_of_knobs_names_bundles_with_other_defaults(tmp_path):
    configs = {"one": {"train": {"views": 16, "depth": 4}}, "two": {"train": {"views": 0}, "inference": {"views": 0}}}
    texts = {tmp_path / f"{one}/{name}.json": json.dumps(each[name]) for one, each in configs.items() for name in each}
    meanings = {name: knob[0] for name, knob in template.knob_meanings().items()}
    before, after = "before\n<!-- knobs -->\n", "<!-- end of knobs -->\nafter\n"
    page = knobs_page(f"{before}old\n{after}", {name: tmp_path / name for name in configs}, texts)
    assert page.startswith(before)
    assert page.endswith(after)
    assert "old" not in page
    assert f"| `views` | `16`, `0` in `two` | both | {meanings['views']} |" in page
    assert f"| `depth` | `4` | `train.json` of `one` | {meanings['depth']} |" in page


def test_the_table_of_a_readme_has_the_knobs_of_its_config_and_words_for_what_is_computed():
    meanings = {"views": ["of a slice"], "steps": ["a length", "by the data"], "depth": ["stages"]}
    table = readme_table({"steps": "$15 * 2", "views": 16, "other": 1}, "train", meanings).splitlines()[2:]
    assert table == ["| `views` | `16` | of a slice |", "| `steps` | by the data | a length |"]
    assert "| `steps` | `300` | a length |" in readme_table({"steps": 300}, "train", meanings)


def test_every_head_differs_in_its_head_its_own_knobs_and_its_start_only():
    configs = {head: json.loads(instance(head, "acdc").files()["configs/train.json"]) for head in HEADS}
    for head, config in configs.items():
        network = networks()[head]
        assert config["network_def"].pop("head") == network["head"]
        assert config["start_checkpoint"].pop("name") == network["pretrained"]
        for knob, default in network.get("head_knobs", {}).items():
            assert config.pop(knob) == default
            assert config["trained_with"].pop(knob) == f"@{knob}"
        assert config.pop("learning_rate") == network["hearts"]["learning_rate"]
        assert network["head_about"] in config.pop("_desc_")
    first, *others = configs.values()
    assert all(other == first for other in others)


def test_no_place_is_left_in_any_file_and_every_config_is_json(written):
    for path in (path for path in written.rglob("*") if path.is_file()):
        text = path.read_text()
        assert not re.search(r'"\.\.\.\w|\{\{|<!-- (only for|end|knobs)|_only_for_', text), path.name
        if path.suffix == ".json":
            assert isinstance(json.loads(text), dict)


def keys_of(value):
    """All keys of a config, at whatever depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from keys_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys_of(item)


def configs_with_numbered_keys(folder: Path) -> list[tuple[str, str]]:
    """The keys of configs by which a part of a list is meant by its number."""
    numbered = re.compile(r"(#|::)\d+(#|::|$)")
    return [
        (path.name, key)
        for path in sorted(folder.glob("*.json"))
        for key in keys_of(json.loads(path.read_text()))
        if numbered.search(key)
    ]


def test_no_config_changes_a_list_by_a_number(written):
    assert configs_with_numbered_keys(written / "configs") == []


@pytest.mark.parametrize(
    "folder", sorted((REPOSITORY / "bundles").glob("*/configs")), ids=lambda path: path.parent.name
)
def test_no_config_of_a_bundle_changes_a_list_by_a_number(folder):
    assert configs_with_numbered_keys(folder) == []


def test_a_key_with_a_number_would_be_found(tmp_path):
    (tmp_path / "a.json").write_text('{"train#handlers#2#interval": 1, "b": {"c::0": 2, "d#e1": 3}}')
    assert configs_with_numbered_keys(tmp_path) == [("a.json", "train#handlers#2#interval"), ("a.json", "c::0")]


def dangling_references(folder: Path, *names: str, unused: tuple[str, ...] = ()) -> list[str]:
    """What a config refers to that it does not have, by the top-level keys that are used."""
    parser = ConfigParser()
    parser.read_config([str(folder / f"{name}.json") for name in names])
    parser.resolve_macro_and_relative_ids()
    ids = set()
    references = set()

    def look(value, place):
        ids.add(place)
        if isinstance(value, dict):
            for key, item in value.items():
                if key != "_desc_":
                    look(item, f"{place}::{key}" if place else key)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                look(item, f"{place}::{index}")
        elif isinstance(value, str):
            references.update(ReferenceResolver.match_refs_pattern(value))

    look({key: value for key, value in parser.config.items() if key not in unused}, "")
    return sorted(references - ids)


def test_references_resolve_in_every_workflow(written):
    folder = written / "configs"
    overlays = {path.stem for path in folder.glob("*.json")} - {"train", "evaluate", "inference", "metadata"}
    of_inference = {name for name in overlays if name.startswith("inference_")} | {"function", "correct"} & overlays
    of_evaluation = {"multi_gpu_evaluate"}
    for name in ("", *overlays - of_inference - of_evaluation):
        assert dangling_references(folder, *("train", name)[: 1 + bool(name)]) == [], name
    for name in ("", *of_evaluation, *{"sam", "neck", "from_scratch"} & overlays):
        assert dangling_references(folder, *("train", "evaluate", name)[: 2 + bool(name)]) == [], name
    for name in ("", *of_inference):
        assert dangling_references(folder, *("inference", name)[: 1 + bool(name)]) == [], name
    known = json.loads((folder / "inference.json").read_text()).keys()
    for name in {"sam", "from_scratch"} & overlays:
        of_training = json.loads((folder / f"{name}.json").read_text()).keys() - known
        assert dangling_references(folder, "inference", name, unused=tuple(of_training)) == [], name


def test_a_reference_to_nothing_would_be_found(tmp_path):
    (tmp_path / "a.json").write_text(
        '{"a": {"b": [1, {"c": "$@a#b#0 + @x"}]}, "d": "@a#b#1#c", "e": "@a#z", "_desc_": ""}'
    )
    assert dangling_references(tmp_path, "a") == ["a::z", "x"]
    assert dangling_references(tmp_path, "a", unused=("e",)) == ["x"]


@pytest.mark.parametrize("head", HEADS)
def test_on_another_encoder_the_papers_recipe_is_the_bundles_own(head):
    shipped, own = (instance(head, "acdc", model_type).files() for model_type in (SHIPPED_ENCODER, "vit_b"))
    assert shipped.keys() - own.keys() == {"configs/sam.json"}
    recipe, train = json.loads(shipped["configs/sam.json"]), json.loads(own["configs/train.json"])
    del recipe["_desc_"]
    assert recipe.items() <= train.items()
    assert recipe["model_type"] == "vit_b"
    inference = json.loads(own["configs/inference.json"])
    assert (inference["model_type"], inference["start_checkpoint"]) == ("vit_b", None)
    assert json.loads(shipped["configs/train.json"]) | recipe == train | {
        "_desc_": json.loads(shipped["configs/train.json"])["_desc_"]
    }


@pytest.mark.parametrize("model_type", encoders())
def test_large_files_name_the_published_encoder(model_type):
    published = encoders()[model_type]
    text = instance("linearhead", "acdc", model_type).files()["large_files.yml"]
    assert all(value in text for value in published.values())


def test_a_file_of_ones_own_is_the_encoder_of_its_bundle():
    encoder = {"model_type": "vit_t", "sam_checkpoint": "x.pt"}
    made = Instance("linearhead", cases="custom", hearts=False, **encoder, texts=OWN_TEXTS)
    files = made.files()
    assert "large_files.yml" not in files
    for name in ("train", "inference"):
        config = json.loads(files[f"configs/{name}.json"])
        assert (config["model_type"], config["sam_checkpoint"]) == ("vit_t", "x.pt")


@pytest.mark.parametrize(
    "head", [pytest.param(head, marks=() if head == "linearhead" else pytest.mark.slow) for head in HEADS]
)
def test_the_papers_recipe_trains_evaluates_and_segments_on_sams_encoder(head, sam_checkpoint, tmp_path):
    data = write_phantom_dataset(str(tmp_path / "data"), patients=4, size_hw_d=(64, 48, 2))
    configs = REPOSITORY / f"bundles/{head}_acdc/configs"
    given = {"sam_checkpoint": sam_checkpoint, "dataset_dir": data, "bundle_root": str(tmp_path), "cache_gb": 1}
    training = {**given, "image_size": 64, "epochs": 1, "views": 1, "is_silent": True}
    training["cache_dir"] = str(tmp_path / "embeddings")

    def run(run_id, *names, **overrides):
        files = [str(configs / f"{name}.json") for name in names]
        monai.bundle.run(run_id, config_file=files, logging_file=False, **overrides)

    run("training", "train", "sam", **training)
    state = torch.load(tmp_path / "models/model.pt", weights_only=True)
    assert [key for key in state if key.startswith("encoder.")] == ["encoder.fingerprint"]
    knobs = ("canvas_size", "crop_size", "slice_smoothing", "largest_component", "test_time_views", "ckpt_path")
    parsed = []
    for names in (("train", "evaluate", "sam"), ("train", "sam", "evaluate")):
        parser = ConfigParser()
        parser.read_config([str(configs / f"{name}.json") for name in names])
        parser.update(training)
        parsed.append([parser.get_parsed_content(knob) for knob in knobs])
    assert parsed[0] == parsed[1] == [256, 256, 0, False, 1, str(tmp_path / "models/model.pt")]
    run("evaluating", "train", "evaluate", "sam", **training)
    assert (tmp_path / "eval/metrics.csv").is_file()
    volume = next(Path(data).rglob("*frame01.nii.gz"))
    given |= {"dataset_dir": str(volume), "output_dir": str(tmp_path / "out")}
    del given["cache_gb"]
    run("inferring", "inference", "sam", **given)
    (prediction,) = (tmp_path / "out").glob("*_pred.nii.gz")
    assert nib.load(prediction).shape == nib.load(volume).shape


def blocks_of_contributing() -> tuple[str, str, str]:
    """What CONTRIBUTING.md tells to write for a new head: the class, the line and the block."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    section = re.search(r"^## Add a head\n(.*?)^## ", text, flags=re.MULTILINE | re.DOTALL)[1]
    class_, line, block = re.findall(r"^```\w+\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return class_, line, block


def add_block(networks_file: Path) -> str:
    """Add the block of CONTRIBUTING.md to a `networks.json`; returns the head's name."""
    content = json.loads(networks_file.read_text())
    ((name, entry),) = json.loads(blocks_of_contributing()[2]).items()
    assert name not in content["networks"]
    content["networks"][name] = entry
    networks_file.write_text(json.dumps(content))
    return name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", [SHIPPED_ENCODER, "vit_b"])
def test_a_head_of_one_block_has_bundles_of_every_kind(kind, model_type, tmp_path, monkeypatch):
    shutil.copytree(template.FOLDER, tmp_path / "template")
    name = add_block(tmp_path / "template/networks.json")
    monkeypatch.setattr(template, "FOLDER", tmp_path / "template")
    namespace = dict(vars(heads))
    exec(blocks_of_contributing()[0], namespace)
    (class_,) = namespace.keys() - vars(heads).keys()
    monkeypatch.setattr(heads, class_, namespace[class_], raising=False)
    entry = networks()[name]
    assert entry["head"]["_target_"] == f"components.networks.{class_}"
    instance(name, kind, model_type).write(tmp_path / "bundle")
    if kind != "acdc":
        (tmp_path / "bundle/configs/data.json").write_text(json.dumps(description_of_hearts()))
    names = ("train", "inference")
    for config in names:
        parser = ConfigParser()
        parser.read_config(str(tmp_path / f"bundle/configs/{config}.json"))
        parser["network_def"]["head"]["_target_"] = f"components.networks.heads.{class_}"  # not offered to configs here
        parser.update({"bundle_root": str(tmp_path / "bundle"), "image_size": 64})
        parser.update({"cache_dir": None, "model_type": "vit_tiny", "sam_checkpoint": None, "crop_size": 64})
        parser.update({"canvas_size": 64, "test_time_views": 1})
        if config == "train":
            parser.update({"largest_component": False, "normalisation": [0.5, 99.5], "planes": 1})
        network = parser.get_parsed_content("network_def").eval()
        assert type(network.head).__name__ == class_
        with torch.no_grad():
            assert network(torch.rand(2, 3, 64, 64)).shape == (2, 4, 64, 64)


def description_of_hearts() -> dict:
    """A `data.json` of hearts without cases."""
    lists = {name: [] for name in ("training", "validation", "test", "unlabelled")}
    classes = {"class_names": ["RV", "Myo", "LV"], "label_values": [0, 1, 2, 3], "channels": 1, "pictures": False}
    return {"dataset_dir": "", "modality": "MR", "slice_axis": 2, "turned_views": False, **classes, **lists}


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy of the repository, with spoiled files, to which the head of CONTRIBUTING.md has been added as it says."""
    root = tmp_path_factory.mktemp("repository")
    outputs = ("models", "eval", "demo", "export", "embeddings")
    for name in ("bundles", "components", "adapt", "autosam", "release"):
        ignored = shutil.ignore_patterns("__pycache__", *(outputs if name == "bundles" else ()))
        shutil.copytree(REPOSITORY / name, root / name, ignore=ignored)
    (root / "docs").mkdir()
    for name in ("constraints.txt", "LICENSE", "docs/knobs.md"):
        shutil.copy(REPOSITORY / name, root / name)
    class_, line, _ = blocks_of_contributing()
    heads_file, contents = root / "components/networks/heads.py", root / "components/networks/__init__.py"
    heads_file.write_text(f"{heads_file.read_text()}\n\n{class_}")
    changed, count = re.subn(r"^ *\"heads\": .*\n", line, contents.read_text(), flags=re.MULTILINE)
    assert count == 1
    contents.write_text(changed)
    add_block(root / "adapt/template/networks.json")
    spoil_bundles(root)
    subprocess.run([sys.executable, "-m", "adapt", "bundles"], cwd=root, check=True)
    return root


def added_bundle(repository: Path) -> Path:
    """The folder of the bundle that the repository itself does not have."""
    (name,) = {path.name for path in repository.glob("bundles/*_acdc")} - {
        path.name for path in (REPOSITORY / "bundles").glob("*_acdc")
    }
    return repository / "bundles" / name


def test_a_head_added_by_a_class_a_line_and_a_block_trains_evaluates_infers_and_is_packed(
    repository, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(repository))
    root = added_bundle(repository)
    data = write_phantom_dataset(str(tmp_path / "phantoms"), patients=4, size_hw_d=(64, 48, 3))
    train, evaluate, inference = (f"configs/{name}.json" for name in ("train", "evaluate", "inference"))
    model, volume = str(tmp_path / "models/model.pt"), next(Path(data).rglob("*frame01.nii.gz"))
    training = {"dataset_dir": data, "output_dir": str(tmp_path / "eval"), "ckpt_dir": str(tmp_path / "models")}
    training |= {"cache_dir": "$None", "test_time_views": 1}
    short = {"epochs": 1, "train#prepare_batch#pool_size": 4}
    inferring = {"dataset_dir": str(volume), "ckpt_path": model, "output_dir": str(tmp_path / "out")}
    runs = {
        "training": {"config_file": train, **training, **short},
        "evaluating": {"config_file": [train, evaluate], **training},
        "inferring": {"config_file": inference, **inferring},
    }
    packing = {"output_dir": str(tmp_path / "dist"), "bundle": root.name, "model": model}
    command = [
        sys.executable,
        "-c",
        ALL_WORKFLOWS,
        json.dumps([runs, packing]),
    ]  # one process for all: it starts slowly
    succeeds(subprocess.run(command, cwd=root, capture_output=True, text=True, check=False))
    assert (tmp_path / "eval/metrics.csv").is_file()
    assert nib.load(tmp_path / "out" / volume.name.replace(".nii", "_pred.nii")).shape == nib.load(volume).shape
    (archive,) = (tmp_path / "dist").glob(f"{root.name}_v*.zip")
    with zipfile.ZipFile(archive) as file:
        packed = set(file.namelist())
    assert {f"{root.name}/models/model.pt", f"{root.name}/configs/train.json"} <= packed


def test_every_added_head_has_a_readme_of_its_own(repository):
    root = added_bundle(repository)
    readme, name = (
        (root / "docs/README.md").read_text(),
        json.loads((root / "configs/metadata.json").read_text())["name"],
    )
    assert readme.startswith(f"# {name}\n")
    assert "autosam_acdc" not in readme
    assert "shipped head" not in readme  # no weights of it come with the package
