"""The structure of `components`: which way its sub-packages import, and what configs may name."""

import ast
import importlib
import re
import subprocess
import sys
from pydoc import locate  # by which MONAI finds what a config names

import pytest
from conftest import REPOSITORY

COMPONENTS = REPOSITORY / "components"
PLACES = ("bundles/*/configs", "adapt/template/configs", "adapt/template")
CONFIGS = sorted(path for place in PLACES for path in REPOSITORY.glob(f"{place}/*.json"))
SUB_PACKAGES = re.findall(r"^\| `(\w+)` \|", (COMPONENTS / "__init__.py").read_text(), flags=re.MULTILINE)


def imported_sub_packages(module) -> set[str]:
    """The sub-packages of `components` that a file imports from, wherever in it."""
    tree = ast.walk(ast.parse(module.read_text()))
    names = [node.module or "" for node in tree if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[1] for name in names if name.startswith("components.")}


def test_the_table_of_contents_lists_every_sub_package():
    folders = {path.parent.name for path in COMPONENTS.glob("*/__init__.py")}
    assert sorted(SUB_PACKAGES) == sorted(folders)
    assert {path.name for path in COMPONENTS.glob("*.py")} == {"__init__.py"}


@pytest.mark.parametrize("name", SUB_PACKAGES)
def test_a_sub_package_imports_from_those_above_it_in_the_table_only(name):
    allowed = set(SUB_PACKAGES[: SUB_PACKAGES.index(name) + 1])
    for module in (COMPONENTS / name).glob("*.py"):
        assert imported_sub_packages(module) <= allowed, module


def test_importing_every_sub_package_loads_none_of_their_modules():
    names = ", ".join(f"components.{name}" for name in SUB_PACKAGES)
    code = f"import sys, {names}; print(*[n for n in sys.modules if n.startswith('components.') and n.count('.') > 1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", SUB_PACKAGES)
def test_everything_a_sub_package_offers_to_configs_is_there_and_named_by_one(name):
    configs = [path.read_text() for path in CONFIGS]
    package = importlib.import_module(f"components.{name}")
    for offered in getattr(package, "__all__", []):
        assert callable(getattr(package, offered)), offered
        assert any(f'"components.{name}.{offered}"' in config for config in configs), offered


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_target_of_a_config_is_offered_by_its_sub_package(path):
    for target in re.findall(r'"components\.([\w.]+)"', path.read_text()):
        name, _, attribute = target.partition(".")
        package = importlib.import_module(f"components.{name}")
        assert attribute in dir(package), target
        assert locate(f"components.{target}") is getattr(package, attribute), target
