"""The documentation: its commands, options, configs, code, links and pictures, checked without running them.

Only `python -m adapt new` is run, on data of the tests, as later commands of a page are typed in the bundle it makes.
"""

import configparser
import functools
import inspect
import json
import re
import shlex
from pathlib import Path

import fire
import monai.bundle
import numpy as np
import pytest
import typer
from conftest import REPOSITORY
from PIL import Image
from test_architecture import COMPONENTS, SUB_PACKAGES, imported_sub_packages
from torch.distributed.run import get_args_parser

from adapt.__main__ import bundles, new
from adapt.new import new_bundle
from adapt.template import SHIPPED_ENCODER, networks
from autosam.__main__ import app
from autosam.options import KNOB_OPTIONS, command_line
from benchmarks.__main__ import parse_arguments
from components.phantom.dataset import write_phantom_dataset
from components.training.command_line import refuse_unknown_knobs
from release.__main__ import build
from serving.__main__ import serve
from study.__main__ import report, run
from study.calibration import calibrate

README = REPOSITORY / "README.md"
ARCHITECTURE = REPOSITORY / "docs/architecture.md"
PAGES = [
    README,
    REPOSITORY / "CONTRIBUTING.md",
    *sorted(REPOSITORY.glob("docs/*.md")),
    *sorted(REPOSITORY.glob("bundles/*/docs/README.md")),
]
APART = (REPOSITORY / "docs/lab_notes.md", REPOSITORY / "docs/encoders.md")
LANGUAGES = {"bash", "json", "python", "text"}
OUR_COMMANDS = {
    "adapt": command_line(None, new, bundles, positional=("name",), aliases=KNOB_OPTIONS),
    "autosam": app,
    "release": command_line(None, build),
    "serving": command_line(None, serve),
    "study": command_line(None, run, report, calibrate),
}
UsageError = typer.BadParameter.__base__
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def blocks_of(page, language):
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


def anchors_of(page):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_of(block):
    """The words of every command in a block, without comments."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


@pytest.fixture(scope="module")
def adapt_new(tmp_path_factory):
    """A function that makes a bundle as `python -m adapt new` does, of pictures or of hearts; each of them once."""
    pictures, hearts = (tmp_path_factory.mktemp(name) for name in ("pictures", "hearts"))
    for role, value in (("images", 200), ("labels", 1)):
        (pictures / role).mkdir()
        for name in ("a", "b"):
            pixels = np.zeros([32, 32], dtype=np.uint8)
            pixels[8:20, 8:20] = value
            Image.fromarray(pixels).save(pictures / role / f"{name}.png")
    write_phantom_dataset(str(hearts), patients=2, size_hw_d=(64, 64, 3))

    @functools.cache
    def make(network, model_type=SHIPPED_ENCODER, *, of_hearts=False):
        data, folder = hearts if of_hearts else pictures, tmp_path_factory.mktemp("bundles")
        return new_bundle("own", data, folder, network=network, model_type=model_type)[0]

    return make


class Shell:
    """Commands as they are typed one after another, each of which is checked.

    Args:
        folder: where the first one is typed.
        adapt_new: makes the bundles of `python -m adapt new`.
        monkeypatch: of pytest, to be in the folder where a command is typed.
    """

    def __init__(self, folder, adapt_new, monkeypatch):
        self.folder = folder
        self.adapt_new = adapt_new
        self.monkeypatch = monkeypatch
        self.made = {}

    def check(self, words):
        self.monkeypatch.chdir(self.folder)
        match words:
            case ["cd", target]:
                folder = (self.folder / target).resolve()
                is_made = folder.parent == REPOSITORY / "bundles" and folder.name in self.made
                self.folder = self.made[folder.name] if is_made else folder
                assert self.folder.is_dir(), folder
            case [".", script]:
                assert script.endswith("/bin/activate")
            case ["pip", "install", *arguments]:
                check_installation(arguments, self.folder)
            case ["python", "-m", "monai.bundle", command, *arguments]:
                check_bundle_command(command, arguments, self.folder)
            case ["torchrun", *arguments]:
                options = get_args_parser().parse_args(arguments)
                assert options.module
                self.check(["python", "-m", options.training_script, *options.training_script_args])
            case ["python", "-m", "benchmarks", *arguments]:
                assert self.folder == REPOSITORY
                parse_arguments(arguments)
            case ["python", "-m", "adapt" | "release" | "serving" | "study" as package, *arguments]:
                assert self.folder == REPOSITORY
                self.check_ours(package, arguments)
            case ["autosam", *arguments]:
                self.check_ours("autosam", arguments)
            case ["python", "-m", "pytest", *arguments]:
                assert all(argument in ("-m", "slow") or (self.folder / argument).exists() for argument in arguments)
            case ["python", "-m", "venv", _] | ["mlflow", "ui", *_] | ["git" | "tensorboard", *_]:
                pass
            case _:
                pytest.fail(f"no check for the command: {shlex.join(words)}")

    def check_ours(self, package, arguments):
        """Check a command of ours: its options, and that the files and bundles that it names are there."""
        name, options, knobs = understood(OUR_COMMANDS[package], arguments)
        assert (REPOSITORY / (options.get("config") or options.get("grid") or ".")).exists()
        if name == "new":
            is_at_hand = options["checkpoint"] is None  # else the file of another encoder stands for it
            self.made[options["name"]] = self.adapt_new(
                options["network"], options["encoder"] if is_at_hand else SHIPPED_ENCODER
            )
        elif package == "autosam" and options.get("bundle") and name != "serve":
            bundle = Path(options["bundle"]).name
            folder = self.made.get(bundle, REPOSITORY / "bundles" / bundle)
            overlays = {"train": options.get("overlay") or [], "evaluate": ["evaluate"]}.get(name, [])
            self.monkeypatch.chdir(folder)
            files = ["inference"] if name in ("segment", "correct", "pack") else ["train", *overlays]
            check_bundle_command(
                "run", ["--config_file", str([f"configs/{file}.json" for file in files]), *knobs], folder
            )

    def check_blocks(self, page):
        """Check the commands of a page, each block typed in the folder of the first."""
        start = self.folder
        for block in blocks_of(page, "bash"):
            self.folder = start
            for words in commands_of(block):
                self.check(words)


def check_installation(arguments, folder):
    extras = configparser.ConfigParser()
    extras.read(REPOSITORY / "setup.cfg")
    match arguments:
        case ["-c", constraints, "setuptools"]:
            assert (folder / constraints).is_file()
        case ["-c", constraints, "-e", target] | ["--no-build-isolation", "-c", constraints, "-e", target]:
            assert (folder / constraints).is_file()
            assert folder == REPOSITORY
            found = re.fullmatch(r"\.(?:\[(\w+)\])?", target)
            assert found is not None
            assert found[1] is None or found[1] in extras["options.extras_require"]
        case _:
            pytest.fail(f"no check for the installation: {shlex.join(arguments)}")


def bound_by_fire(function, arguments):
    """The arguments by name with which python-fire would call a function; it exits where some do not fit."""
    bound = {}

    @functools.wraps(function)
    def record(*values, **options):
        bound.update(zip(inspect.signature(function).parameters, values, strict=False), **options)

    fire.Fire(record, command=list(arguments))
    return bound


def understood(command_line_of_ours, arguments):
    """The command that arguments are for, its options, and what is left as knobs; it exits where some do not fit."""
    command = typer.main.get_command(command_line_of_ours)
    context = command.make_context("command", list(arguments))
    if hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return command.name, context.params, context.args


def check_bundle_command(command, arguments, folder):
    """Check that a bundle's folder has all that a command of MONAI's names."""
    assert (folder / "configs/metadata.json").is_file(), "a command for a bundle, outside of its folder"
    values = bound_by_fire(getattr(monai.bundle, command), arguments)
    files = values.get("config_file") or []
    files = [files] if isinstance(files, str) else files
    missing = [path for path in (*files, *filter(None, [values.get("meta_file")])) if not (folder / path).is_file()]
    assert missing == []
    config = monai.bundle.ConfigParser.load_config_files(files) if files else {}
    if command == "run":
        refuse_unknown_knobs(["monai.bundle", command, *arguments])
        assert isinstance(config.get(values.get("run_id") or "run"), list | str), "no run_id of the configs"
    else:
        assert "net_id" not in values or values["net_id"] in config
        assert command != "download_large_files" or list(folder.glob("large_files.*"))


@each_page
def test_every_command_is_one_that_its_tool_accepts(page, adapt_new, monkeypatch):
    start = page.parents[1] if page.name == "README.md" and page != README else REPOSITORY
    Shell(start, adapt_new, monkeypatch).check_blocks(page)


@pytest.mark.parametrize("of_hearts", [False, True], ids=["pictures", "hearts"])
@pytest.mark.parametrize(
    ("network", "model_type"), [*((name, SHIPPED_ENCODER) for name in networks()), ("cnnhead", "vit_b")]
)
def test_the_commands_of_a_bundle_for_own_data_are_accepted_in_it(
    network, model_type, of_hearts, adapt_new, monkeypatch
):
    bundle = adapt_new(network, model_type, of_hearts=of_hearts)
    page = bundle / "docs/README.md"
    assert len(blocks_of(page, "bash")) == 1
    assert "{{" not in page.read_text()
    Shell(bundle, adapt_new, monkeypatch).check_blocks(page)


@pytest.mark.parametrize(
    "line",
    [
        "python -m monai.bundle run training --config_file configs/train.json --labeled_patients 5",
        "python -m monai.bundle run train --config_file configs/train.json",
        "python -m monai.bundle run training --config_file configs/missing.json",
        "python -m monai.bundle ckpt_export --net_id net --config_file configs/inference.json",
        "torchrun --nproc_per_node=2 -m monai.bundle run training --config_file configs/train.json --epoch 5",
        "cd ../.. && python -m study run --config study/quick.json --out DIR",
        "cd ../.. && python -m study run --config study/missing.json --output_dir DIR",
        "cd ../.. && python -m release --output DIR",
        "cd ../.. && python -m serving --study DIR",
        "cd ../.. && python -m benchmarks --output DIR --rounds no",
        "cd ../.. && pip install -c constraints.txt -e '.[missing]'",
        "cd ../.. && pip install -c missing.txt -e .",
        "cd ../.. && python -m adapt new NAME --data DIR --network missing",
        "cd ../.. && python -m adapt new X --data DIR --network unet && cd bundles/X"
        " && python -m monai.bundle download_large_files",
        "autosam train unet_acdc --overlay missing",
        "autosam train unet_acdc --labeled_patients 5",
        "autosam segment volume.nii.gz --bundle missing",
        "autosam study study/missing.json",
        "autosam missing",
        "cd missing",
        "curl https://example.org",
    ],
)
def test_a_wrong_command_is_found(line, adapt_new, monkeypatch):
    shell = Shell(REPOSITORY / "bundles/autosam_acdc", adapt_new, monkeypatch)
    refusals = (AssertionError, ValueError, TypeError, KeyError, OSError, SystemExit, UsageError, pytest.fail.Exception)
    with pytest.raises(refusals):
        for words in commands_of(line):
            shell.check(words)


@each_page
def test_every_option_that_the_text_names_exists(page, adapt_new, tmp_path):
    spans = re.findall(r"`([^`]+)`", BLOCK.sub("", page.read_text()))
    named = {name for span in spans for name in re.findall(r"(?<!\S)--(\w+)", span)}
    ours = [each for app in OUR_COMMANDS.values() for each in app.registered_commands]
    others = {name for command in ours for name in inspect.signature(command.callback).parameters}
    others |= {"nthreads", "resources", "help"}  # the first two of Dask's workers
    bundles = [*REPOSITORY.glob("bundles/*"), *map(adapt_new, networks())]
    configs = [json.loads(path.read_text()) for bundle in bundles for path in bundle.glob("configs/*.json")]
    (tmp_path / "all.json").write_text(json.dumps({key.split("#")[0]: None for config in configs for key in config}))
    options = [f"--{name}=1" for name in sorted(named - others)]
    files = ["--config_file", str(tmp_path / "all.json"), "--tracking", "mlflow"]  # whatever value the text gives them
    refuse_unknown_knobs(["", "run", *options, *files])


@each_page
def test_code_is_of_a_known_language_and_reads_well(page):
    assert {language for language, _ in BLOCK.findall(page.read_text())} <= LANGUAGES
    assert len(re.findall("^```", page.read_text(), flags=re.MULTILINE)) == 2 * len(BLOCK.findall(page.read_text()))
    for text in blocks_of(page, "json"):
        json.loads(text)
    for text in blocks_of(page, "python"):
        compile(text, str(page), "exec")


@each_page
def test_every_relative_link_and_picture_is_there(page):
    for link in LINK.findall(BLOCK.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_front_page_is_short_and_leads_to_every_page():
    text = README.read_text()
    assert len(text.splitlines()) <= 100
    pages = {str(page.relative_to(REPOSITORY)) for page in PAGES if page != README}
    assert pages <= set(LINK.findall(text))
    commands = [line for block in blocks_of(README, "bash") for line in block.splitlines()]
    assert [line for line in commands if len(line) > 100 and not line.startswith("python -m venv")] == []


def test_all_pages_together_are_read_in_an_hour():
    lines = {line for page in PAGES if page not in APART for line in page.read_text().splitlines()}  # of cards, once
    assert sum(len(line.split()) for line in lines) <= 12_355


def test_the_architecture_page_shows_the_imports_that_there_are():
    (diagram,) = blocks_of(ARCHITECTURE, "text")
    shown = {line.split()[0]: set(re.findall(r"\w+", line.partition("<-")[2])) for line in diagram.splitlines()}
    assert list(shown) == SUB_PACKAGES
    for name, imports in shown.items():
        modules = (COMPONENTS / name).glob("*.py")
        assert set().union(*map(imported_sub_packages, modules)) - {name} == imports, name


def test_every_module_that_the_architecture_page_names_is_there():
    named = set(re.findall(r"`(\w+/\w+\.py)`", ARCHITECTURE.read_text()))
    assert len(named) > 20
    assert [name for name in named if not (COMPONENTS / name).is_file() and not (REPOSITORY / name).is_file()] == []
