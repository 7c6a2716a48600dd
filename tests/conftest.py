"""Fixtures that several test modules share: SAM checkpoints with random weights, real ACDC where it is at hand."""

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fire
import monai.bundle
import pytest
import torch
from torch import nn

from components.sam.encoder import SamEncoder
from components.sam.segment_anything_import import import_from_segment_anything

REPOSITORY = Path(__file__).parents[1]
DYNAMIC_BATCH = {  # of `onnx_export`: any number of slices
    "input_names": ["image"],
    "output_names": ["pred"],
    "dynamic_axes": {"image": {0: "batch"}, "pred": {0: "batch"}},
    "opset_version": 20,
}


def pytest_configure() -> None:
    """Give each of the processes among which the tests are divided one thread, and those that it starts as well."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


def randomise_positions(image_encoder: nn.Module) -> None:
    """SAM initialises its positional embeddings with zeros, which no test could tell from leaving them out."""
    nn.init.normal_(image_encoder.pos_embed, std=0.1)
    for block in image_encoder.blocks:
        nn.init.normal_(block.attn.rel_pos_h, std=0.1)
        nn.init.normal_(block.attn.rel_pos_w, std=0.1)


@pytest.fixture(scope="module")
def one_thread():
    """Keep small tensors off the thread pool: on a busy machine its threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed):
    generator = torch.Generator()
    generator.manual_seed(seed)
    return generator


def assert_readme_explains_knobs(bundle: Path, *configs: str, except_for: tuple[str, ...] = ()) -> None:
    """A bundle's README has a row for every top-level knob of its configs, with the default of the first to have it.

    A default that the configs compute is given in words.
    """
    readme = (bundle / "docs/README.md").read_text()
    knobs: dict = {}
    for name in reversed(configs):
        knobs |= json.loads((bundle / f"configs/{name}.json").read_text())
    explained = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", readme, flags=re.MULTILINE))
    for name, default in explained.items():
        value = knobs[name]
        if isinstance(value, int | float) or (value and isinstance(value, str) and not value.startswith("$")):
            assert default == f"`{value if isinstance(value, str) else json.dumps(value)}`", name
        else:
            assert default, name
            assert not default.startswith(("`$", "`{")), name
    plain = {key for key, value in knobs.items() if isinstance(value, int | float | str) and key.isidentifier()}
    plain = {key for key in plain if not key.startswith("_")}
    hidden = {"bundle_root", "device", "network", "run", "out_channels", "canvas_size", "is_silent", *except_for}
    hidden |= {"channels", "pictures"}  # the data's own, like class_names
    assert plain - hidden - explained.keys() == set()


def run_monai_bundle(*arguments: str, cwd: Path, processes: int = 1) -> subprocess.CompletedProcess:
    """Run MONAI's runner as a user would, several processes under torchrun, which gives each one thread."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else ()), "-m", "monai.bundle", *arguments],
        cwd=cwd,
        env={**os.environ, "MONAI_FAIL_ON_DUPLICATE_CONFIG": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@contextlib.contextmanager
def everything_logged_to(handler: logging.Handler) -> Iterator[None]:
    """Give a handler all that is logged from INFO on, whatever an earlier run in this process has set."""
    metrics = logging.getLogger("monai.handlers.StatsHandler")  # MONAI makes it pass nothing on
    loggers = [logging.getLogger(), metrics, logging.getLogger("ignite.engine.engine")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
    metrics.propagate = False
    for logger in loggers[:2]:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
        handler.close()


def run_monai_bundle_here(*arguments: str, cwd: Path) -> str:
    """Run MONAI's runner in this process, which has started: a process of its own takes seconds for that.

    An error is raised as it is. The bundles check the command line of a process of its own only.

    Returns:
        what was logged and printed.
    """
    said = io.StringIO()
    options = ["--logging_file", "False"] if arguments[0] == "run" else []  # pytest's own handlers stay
    with pytest.MonkeyPatch.context() as patch, everything_logged_to(logging.StreamHandler(said)):
        patch.chdir(cwd)
        patch.setenv("MONAI_FAIL_ON_DUPLICATE_CONFIG", "1")
        patch.setattr(sys, "path", [*sys.path])  # to which MONAI adds the bundle's folder
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            fire.Fire(getattr(monai.bundle, arguments[0]), command=[*arguments[1:], *options])
    return said.getvalue()


def run_in_this_process(stage, log, **_) -> None:
    """Run a stage of a study as MONAI's runner does, which takes seconds to start in a process of its own."""
    configs = [str(stage.method.config(name)) for name in stage.configs]
    knobs = {name: "$None" if value is None else value for name, value in stage.knobs.items()}  # as on a command line
    options = {"bundle_root": str(stage.method.folder), "is_silent": True, **knobs}
    with everything_logged_to(logging.FileHandler(log)):
        monai.bundle.run(stage.name, config_file=configs, logging_file=False, **options)


def succeeds(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def messages_of(error: BaseException | None) -> str:
    """The messages of an error and of all that led to it: MONAI wraps the errors of what a config names."""
    messages = []
    while error is not None:
        messages.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(messages)


def labels_of(method, labelled_patients, split, value=""):
    """The columns that name a cell in a study's tables, of the method as it is or of a value of its depth."""
    from study.grid import Cell, Variant  # here, since most test modules need none of a report's packages
    from study.report.scores import cell_labels

    variant = Variant("depth", value) if value else None
    return cell_labels(Cell(method, labelled_patients, split, variant), training_cases=0)


def mark_finished(folder: Path) -> None:
    """Make a folder that of a study's cell of which all is done."""
    (folder / "cell.json").write_text(json.dumps({"commands": {"evaluating": []}, "seconds": {"evaluating": 1}}))


@pytest.fixture(autouse=True)
def _restored_loggers() -> Iterator[None]:
    """Give loggers their levels back: engines and commands that run in this process change them for good."""
    loggers = [logger for logger in logging.Logger.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    before = [(logger, logger.level, logger.disabled) for logger in loggers]
    yield
    for logger, level, disabled in before:
        logger.setLevel(level)
        logger.disabled = disabled


@pytest.fixture(scope="session")
def sam_vit_b() -> nn.Module:
    """`segment_anything`'s own vit_b with random weights."""
    torch.manual_seed(0)
    sam = import_from_segment_anything("build_sam").build_sam_vit_b()
    randomise_positions(sam.image_encoder)
    return sam


@pytest.fixture(scope="session")
def sam_checkpoint(sam_vit_b, tmp_path_factory) -> str:
    """A checkpoint file saved from it, in Meta's layout."""
    path = tmp_path_factory.mktemp("sam") / "sam_vit_b_random.pth"
    torch.save(sam_vit_b.state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_sam_checkpoint(sam_vit_b, tmp_path_factory) -> str:
    """A checkpoint in Meta's layout of SAM with the tiny encoder."""
    state = {key: value for key, value in sam_vit_b.state_dict().items() if not key.startswith("image_encoder.")}
    encoder = SamEncoder("vit_tiny").image_encoder.state_dict()
    path = tmp_path_factory.mktemp("sam") / "sam_vit_tiny_random.pth"
    torch.save(state | {f"image_encoder.{key}": value for key, value in encoder.items()}, path)
    return str(path)


@pytest.fixture(scope="session")
def sam2_checkpoint(tmp_path_factory) -> str:
    """A folder as `transformers` saves SAM 2.1 with the tiny encoder, without a weight that is 0 or 1."""
    transformers = pytest.importorskip("transformers", reason="needs pip install -c constraints.txt -e '.[encoders]'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = transformers.Sam2Model(transformers.Sam2Config())  # by default the tiny one
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.shared_image_embedding.load_state_dict(model.prompt_encoder.shared_embedding.state_dict())  # as published
    folder = tmp_path_factory.mktemp("sam2")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def acdc_dir() -> str:
    """Real ACDC patients: the folder named by ACDC_DIR, or one shared beside the checkout."""
    path = Path(os.environ.get("ACDC_DIR", REPOSITORY.parent / "shared" / "data" / "acdc"))
    if not (path / "training").is_dir():
        pytest.skip("no ACDC data at hand: set ACDC_DIR to the release's root")
    return str(path)


@pytest.fixture(scope="session")
def metadata_schema() -> str:
    """MONAI's metadata schema: the file named by METADATA_SCHEMA, or one shared beside the checkout."""
    name = "meta_schema_20240725.json"
    path = Path(os.environ.get("METADATA_SCHEMA", REPOSITORY.parent / "shared" / "tools" / name))
    if not path.is_file():
        pytest.skip(f"no {name} at hand: set METADATA_SCHEMA to a copy")
    return str(path)


@pytest.fixture(scope="session")
def label_python(tmp_path_factory) -> str:
    """The Python of an environment with MONAI Label: LABEL_PYTHON, or one set up as the README says."""
    if "LABEL_PYTHON" in os.environ:
        return os.environ["LABEL_PYTHON"]
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin/pip"), "install", "--quiet", "-c", "constraints-label.txt"]
    for packages in (["setuptools"], ["--no-build-isolation", "-e", ".[label]"]):
        subprocess.run([*pip, *packages], cwd=REPOSITORY, check=True)
    return str(folder / "bin/python")
