"""The tutorial notebook: its text, commands and stored outputs; as a slow test it runs.

`python tests/test_tutorial.py` runs it and stores its outputs anew.
"""

import json
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import pytest
import typer
from conftest import REPOSITORY

from autosam.__main__ import app

NOTEBOOK = REPOSITORY / "docs/tutorial.ipynb"
HINT = "pip install -c constraints.txt -e '.[tutorial]'"
MOST_WORDS = 700
MOST_BYTES_OF_A_PICTURE, MOST_BYTES_OF_PICTURES = 60_000, 400_000
KERNEL_SECONDS = 1800
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
GAIN = re.compile(r"mean Dice of the test patients from (\d\.\d{3}) to (\d\.\d{3})")
MEASURED = re.compile(r"mean Dice before: (\d\.\d{3}), after: (\d\.\d{3})")


def cells_of(notebook, kind):
    return [cell | {"source": "".join(cell["source"])} for cell in notebook["cells"] if cell["cell_type"] == kind]


def outputs_of(notebook):
    return [output for cell in cells_of(notebook, "code") for output in cell["outputs"]]


def printed(notebook):
    """All text that the code cells have printed or returned."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain") or "" for output in outputs_of(notebook)]
    return "\n".join("".join(text) for text in texts)


def pictures_of(notebook):
    """The bytes of each picture, in base 64."""
    return [len("".join(output["data"]["image/png"])) * 3 // 4 for output in outputs_of(notebook) if is_picture(output)]


def is_picture(output):
    return "image/png" in output.get("data", {})


def gain(pattern, text):
    (found,) = pattern.findall(" ".join(text.split()))
    return tuple(map(float, found))


def commands_of(notebook):
    """The words after `autosam` of each command, whether it is run or only shown."""
    cells = [*cells_of(notebook, "code"), *cells_of(notebook, "markdown")]
    lines = [line.removeprefix("!") for cell in cells for line in cell["source"].splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("autosam ")]


def check_command(words):
    """Check that the command line knows a command, its arguments and its options."""
    group = typer.main.get_command(app)
    name, *arguments = words
    assert name in group.commands
    context = group.commands[name].make_context(name, arguments)
    unknown = [word for word in context.args if word.startswith("--") and word[2:] not in knobs_of(context.params)]
    assert unknown == []


def knobs_of(parameters):
    """The knobs of a bundle's configs; those of a UNet for a bundle that the notebook makes."""
    folder = REPOSITORY / "bundles" / parameters["bundle"]
    folder = folder if folder.is_dir() else REPOSITORY / "bundles/unet_acdc"
    return {key for path in folder.glob("configs/*.json") for key in json.loads(path.read_text())}


def execute(folder):
    """Run the notebook in a new folder within `folder`; return it with outputs whose paths are relative."""
    nbclient = pytest.importorskip("nbclient", reason=HINT)
    pytest.importorskip("ipykernel", reason=HINT)
    nbformat = pytest.importorskip("nbformat", reason=HINT)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PATH": commands, "PYTHONPATH": path, "TMPDIR": str(folder)}
    environment["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of tqdm, where ipywidgets are missing
    client = nbclient.NotebookClient(
        notebook,
        timeout=KERNEL_SECONDS,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    client.execute(env=environment)
    for output in outputs_of(notebook):
        if output["output_type"] == "stream":
            output["text"] = relative(output["text"], folder)
    nbformat.validate(notebook)
    return notebook


def relative(text, folder):
    """Leave out the folders of the notebook's run and of the repository, and progress bars."""
    text = re.sub(rf"{re.escape(str(folder))}/[^/\s]+/", "", text).replace(f"{REPOSITORY}/", "")
    lines = [line for line in text.splitlines() if not re.search(r"\d+%\||\[.*it/s\]", line)]
    return "\n".join(lines).strip("\n") + "\n"


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text())


def test_the_notebook_is_complete_and_small(notebook):
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    words = sum(len(cell["source"].split()) for cell in cells_of(notebook, "markdown"))
    assert words <= MOST_WORDS
    for cell in cells_of(notebook, "code"):
        assert cell["execution_count"] is not None
        assert cell["outputs"] or not re.search(r"^!|^show|print\(", cell["source"], flags=re.MULTILINE)
    sizes = pictures_of(notebook)
    assert len(sizes) >= 4
    assert max(sizes) < MOST_BYTES_OF_A_PICTURE
    assert sum(sizes) < MOST_BYTES_OF_PICTURES


def test_its_outputs_have_no_error_and_no_path_of_a_machine(notebook):
    assert all(output["output_type"] != "error" for output in outputs_of(notebook))
    assert not re.search(r"^error: |Traceback", printed(notebook), flags=re.MULTILINE)
    assert re.findall(r"""(?<![\w.<>/])/[\w.]+/[\w./]*""", printed(notebook)) == []


def test_its_commands_are_understood(notebook):
    commands = commands_of(notebook)
    assert {words[0] for words in commands} == {"segment", "train", "evaluate", "new", "serve"}
    for words in commands:
        check_command(words)


@pytest.mark.parametrize("line", ["sgment a", "segment a --batch_sise 3", "train", "new cells", "train b --stps 2"])
def test_a_wrong_command_is_found(line):
    with pytest.raises((AssertionError, typer.BadParameter)):
        check_command(shlex.split(line))


def test_its_text_tells_what_it_measured_and_links_to_pages(notebook):
    text = "\n".join(cell["source"] for cell in cells_of(notebook, "markdown"))
    assert gain(GAIN, text) == gain(MEASURED, printed(notebook))
    for link in LINK.findall(text):
        assert (NOTEBOOK.parent / link).is_file(), link


@pytest.mark.slow
def test_it_runs_and_one_labelled_patient_helps(tmp_path):
    before, after = gain(MEASURED, printed(execute(tmp_path)))
    assert after > before + 0.1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        executed = execute(Path(folder))
    pytest.importorskip("nbformat").write(executed, NOTEBOOK)
