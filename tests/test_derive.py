"""How bundles are derived from one source, and that a head is added by a class, a line and a block."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import pytest
from conftest import REPOSITORY, run_monai_bundle, succeeds

from bundles.derive import as_text, differing_files, edited, head_edits, knobs_page_table, read_entries, with_part
from components.phantom.dataset import write_phantom_dataset

OVERLAY = """{
    "_desc_": "text",

    "knob": 1,
    "train#handlers": [
        {"_target_": "a.First", "options": {"x": 1}},
        {"_target_": "b.Second"}
    ],

    "last": null
}
"""


def test_the_bundles_are_as_derived():
    subprocess.run([sys.executable, str(REPOSITORY / "bundles" / "derive.py"), "--check"], check=True)


def test_a_file_changed_by_hand_a_missing_one_and_an_extra_one_are_found(tmp_path):
    folder = copy_of_bundles(tmp_path)
    assert differing_files(folder) == []
    changed, missing, extra = (
        folder / name
        for name in ("cnnhead_acdc/configs/train.json", "unet_acdc/LICENSE", "linearhead_acdc/configs/demo.json")
    )
    changed.write_text(changed.read_text().replace('"depth": 4', '"depth": 3'))
    missing.unlink()
    extra.write_text("{}")
    assert set(differing_files(folder)) == {changed, missing, extra}


def test_edits_keep_the_layout():
    assert edited(OVERLAY) == edited(edited(OVERLAY))
    assert edited(OVERLAY, replace={"knob": 2}) == edited(OVERLAY).replace('"knob": 1', '"knob": 2')
    assert edited(OVERLAY, replace={"train#handlers#First#options#x": 2}) == edited(OVERLAY).replace('"x": 1', '"x": 2')
    without = json.loads(edited(OVERLAY, remove=["train#handlers#Second"]))
    assert without["train#handlers"] == [{"_target_": "a.First", "options": {"x": 1}}]


def test_a_group_keeps_its_blank_line_when_its_first_key_changes():
    assert '"text",\n\n    "train#handlers"' in edited(OVERLAY, remove=["knob"])
    assert '"text",\n\n    "new": 0,\n    "knob": 1' in edited(OVERLAY, add={"knob": {"new": 0}})


def test_a_transform_stands_on_one_line_and_long_dictionaries_on_several():
    transform = {"_target_": "x" * 100, "keys": ["image", "label"]}
    assert as_text({"transforms": [transform]}).splitlines()[2] == f"        {json.dumps(transform)}"
    assert len(as_text({"transform": transform}).splitlines()) == 6


@pytest.mark.parametrize("name", ["unknown", "train#handlers#Third", "train#handlers#First#options#y", "knob#x"])
def test_an_id_that_the_config_lacks_is_named(name):
    with pytest.raises((KeyError, TypeError)):
        edited(OVERLAY, replace={name: 1})


def test_markdown_without_the_part_to_fill_is_an_error():
    text = "a\n<!-- knobs -->\nold\n<!-- end of knobs -->\nb\n"
    assert with_part(text, "knobs", "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="expected one part <!-- head -->"):
        with_part(text, "head", "new")


def test_the_page_of_knobs_names_bundles_with_other_defaults():
    configs = {"one": {"train": {"views": 16, "depth": 4}}, "two": {"train": {"views": 0}, "inference": {"views": 0}}}
    table = knobs_page_table(configs, {"views": ["of a slice"], "depth": ["stages"]})
    assert "| `views` | `16`, `0` in `two` | both | of a slice |" in table
    assert "| `depth` | `4` | `train.json` of `one` | stages |" in table


def test_every_head_differs_in_its_head_its_own_knobs_and_its_start_only():
    for head in read_entries()["heads"].values():
        edits = head_edits(head)
        assert edits["train"]["replace"].keys() == {"network_def#head"}
        knobs = head.get("knobs", {})
        assert edits["train"]["add"]["precision"] == knobs
        assert edits["inference"]["add"]["as_trained#otherwise#canvas_size"] == knobs
        for config in ("train", "inference"):
            assert all(new.keys() == knobs.keys() for new in edits[config]["add"].values())
        assert edits["tiny"]["replace"].keys() <= {"head_checkpoint", "epochs", "learning_rate", "phantom_share"}


def copy_of_bundles(target: Path) -> Path:
    """The bundles' files, without what running them has made, beside the page of knobs and adapt's template."""
    ignored = shutil.ignore_patterns("models", "eval", "demo", "export", "embeddings", "__pycache__")
    shutil.copytree(REPOSITORY / "bundles", target / "bundles", ignore=ignored)
    shutil.copytree(REPOSITORY / "adapt/template", target / "adapt/template")
    (target / "docs").mkdir()
    shutil.copy(REPOSITORY / "docs/knobs.md", target / "docs/knobs.md")
    return target / "bundles"


def blocks_of_contributing() -> tuple[str, str, str]:
    """What CONTRIBUTING.md tells to write for a new head: the class, the line and the block."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    section = re.search(r"^## Add a head\n(.*?)^## ", text, flags=re.MULTILINE | re.DOTALL)[1]
    class_, line, block = re.findall(r"^```\w+\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return class_, line, block


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy of the repository to which the head of CONTRIBUTING.md has been added as it says."""
    root = tmp_path_factory.mktemp("repository")
    copy_of_bundles(root)
    for name in ("components", "release"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("constraints.txt", "LICENSE"):
        shutil.copy(REPOSITORY / name, root / name)
    class_, line, block = blocks_of_contributing()
    heads, contents = root / "components/networks/heads.py", root / "components/networks/__init__.py"
    heads.write_text(f"{heads.read_text()}\n\n{class_}")
    changed, count = re.subn(r"^ *\"heads\": .*\n", line, contents.read_text(), flags=re.MULTILINE)
    assert count == 1
    contents.write_text(changed)
    entries = root / "bundles/bundles.json"
    content = json.loads(entries.read_text())
    content["heads"] |= json.loads(block)
    entries.write_text(json.dumps(content))
    subprocess.run([sys.executable, "bundles/derive.py"], cwd=root, check=True)
    return root


def test_a_head_added_by_a_class_a_line_and_a_block_trains_evaluates_infers_and_is_packed(
    repository, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(repository))
    (bundle,) = {path.parent.parent.name for path in repository.glob("bundles/*/configs/tiny.json")} - set(
        read_entries()["heads"] | read_entries()["baselines"]
    )
    root = repository / "bundles" / bundle
    data = write_phantom_dataset(str(tmp_path / "phantoms"), patients=4, size_hw_d=(64, 48, 3))
    output = ("--output_dir", str(tmp_path / "eval"))
    folders = ("--dataset_dir", data, *output, "--ckpt_dir", str(tmp_path / "models"), "--cache_dir", "$None")
    short = ("--epochs", "1", "--train#phantoms#pool_size", "4", "--test_time_views", "1")
    train, evaluate, tiny = (f"'configs/{name}.json'" for name in ("train", "evaluate", "tiny"))
    succeeds(run_monai_bundle("run", "training", "--config_file", f"[{train},{tiny}]", *folders, *short, cwd=root))
    configs = ("--config_file", f"[{train},{evaluate},{tiny}]")
    succeeds(run_monai_bundle("run", "evaluating", *configs, *folders, cwd=root))
    assert (tmp_path / "eval/metrics.csv").is_file()

    volume = next(Path(data).rglob("*frame01.nii.gz"))
    infer = ("run", "inferring", "--config_file", f"['configs/inference.json',{tiny}]", "--dataset_dir", str(volume))
    model = ("--ckpt_path", str(tmp_path / "models/model.pt"), "--output_dir", str(tmp_path / "out"))
    succeeds(run_monai_bundle(*infer, *model, cwd=root))
    assert nib.load(tmp_path / "out" / volume.name.replace(".nii", "_pred.nii")).shape == nib.load(volume).shape

    pack = [sys.executable, "-m", "release", "--output_dir", str(tmp_path / "dist"), "--bundle", bundle]
    pack += ["--head", str(tmp_path / "models/model.pt")]
    subprocess.run(pack, cwd=repository, check=True, env=dict(os.environ))
    (archive,) = (tmp_path / "dist").glob(f"{bundle}_v*.zip")
    with zipfile.ZipFile(archive) as file:
        packed = set(file.namelist())
    assert {f"{bundle}/models/model.pt", f"{bundle}/configs/train.json"} <= packed


def test_every_added_head_has_a_readme_of_its_own(repository):
    (readme,) = set(repository.glob("bundles/*/docs/README.md")) - {
        repository / "bundles" / path.relative_to(REPOSITORY / "bundles")
        for path in (REPOSITORY / "bundles").glob("*/docs/README.md")
    }
    name = json.loads((readme.parents[1] / "configs/metadata.json").read_text())["name"]
    assert readme.read_text().startswith(f"# {name}\n")
    assert "autosam_acdc" not in readme.read_text()
