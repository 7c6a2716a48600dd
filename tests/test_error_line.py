"""The last line of a failed command: one sentence, whatever was wrapped around it."""

import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.transforms import Lambdad, SaveImage
from tqdm import tqdm

import components  # noqa: F401 - which sets a hook, but only for MONAI's runner
from components.base.errors import ErrorLine, error_message
from components.base.weights import load_weights
from components.data.transforms import LoadVolumed


def last_line(call, capsys, **options) -> str:
    """What the hook prints for the error of a call."""
    with pytest.raises(BaseException) as caught:
        call()
    ErrorLine(**options)(caught.type, caught.value, caught.tb)
    printed = capsys.readouterr().err
    assert printed.endswith("\n")
    return printed.splitlines()[-1]


def evaluate(expression, **config):
    parser = ConfigParser(config | {"it": expression})
    return lambda: parser.get_parsed_content("it")


@pytest.fixture
def damaged(tmp_path):
    path = tmp_path / "v.nii.gz"
    path.write_bytes(b"junk")
    return str(path)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_of_a_transform_in_a_loader_of_a_config_is_its_message_alone(damaged, num_workers, capsys):
    dataset = Dataset([{"image": damaged}], transform=LoadVolumed(keys="image"))
    loader = DataLoader(dataset, num_workers=num_workers)
    line = last_line(evaluate("$list(@loader)", loader=loader), capsys, with_traceback=False)
    reason = "is not a NIfTI file but something that begins with b'junk': expected a volume as .nii.gz or .nii"
    assert line == f"error: {damaged} {reason}"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_of_others_in_a_loader_has_its_type(num_workers, capsys):
    dataset = Dataset([{"image": 1}], transform=Lambdad("image", func=lambda number: number // 0))
    line = last_line(lambda: list(DataLoader(dataset, num_workers=num_workers)), capsys)
    assert line == "error: ZeroDivisionError: integer division or modulo by zero"


def test_volume_that_cannot_be_written_is_named_without_what_monai_advises(tmp_path):
    (tmp_path / "0.nii.gz").mkdir()
    save = SaveImage(output_dir=tmp_path, output_postfix="", separate_folder=False, print_log=False)
    with pytest.raises(RuntimeError) as caught:
        save(torch.zeros(1, 2, 2, 2))
    message = error_message(caught.value)
    assert message.startswith(f"{tmp_path / '0.nii.gz'} cannot be written: IsADirectoryError: ")


def test_error_of_a_component_is_its_message_alone(capsys):
    line = last_line(
        evaluate("$@nested", nested={"_target_": "components.networks.GreyUNet", "out_channels": 2, "precision": "x"}),
        capsys,
        with_traceback=False,
    )
    assert line.startswith("error: unknown precision 'x'")
    assert "--debug" not in line


def test_message_of_many_lines_and_its_notes_are_one_line(capsys):
    def fail():
        try:
            load_weights(torch.nn.Linear(1, 1), {}, path="model.pt", remedy="give another")
        except ValueError as error:
            error.add_note("a note\nof two lines")
            raise

    line = last_line(fail, capsys, with_traceback=False)
    assert line.startswith("error: model.pt does not fit this network: give another. Error(s) in loading")
    assert line.endswith('Missing key(s) in state_dict: "weight", "bias" a note of two lines')


def test_error_of_others_has_its_type_and_how_to_see_its_traceback(capsys):
    line = last_line(lambda: torch.zeros(2) @ torch.zeros(3), capsys, with_traceback=False)
    assert line.startswith("error: RuntimeError: inconsistent tensor size")
    assert line.endswith("(--debug True shows the traceback)")


def test_bug_in_the_package_is_no_message_of_it(capsys):
    line = last_line(lambda: load_weights(None, {}, path="", remedy=""), capsys, with_traceback=False)
    assert line.startswith("error: AttributeError: 'NoneType' object has no attribute")
    assert line.endswith("(--debug True shows the traceback)")


def test_expression_that_fails_is_quoted_as_the_config_has_it(capsys):
    line = last_line(evaluate("$@size // 0", size=3), capsys, with_traceback=False)
    assert line.startswith("error: ZeroDivisionError: integer division or modulo by zero, in the config's expression")
    assert "$@size // 0" in line


def test_traceback_precedes_the_line_where_it_is_wanted(capsys):
    with pytest.raises(RuntimeError) as caught:
        evaluate("$1 // 0")()
    ErrorLine(with_traceback=True)(caught.type, caught.value, caught.tb)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: ZeroDivisionError: ")
    assert "--debug" not in lines[-1]


def test_interruption_is_printed_as_usual(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert last_line(interrupt, capsys) == "KeyboardInterrupt"


def test_progress_bar_does_not_follow_the_line(capsys):
    bar = tqdm(total=2)
    bar.update()
    line = last_line(evaluate("$1 // 0"), capsys, with_traceback=False)
    assert line.startswith("error: ")
    bar.close()
    assert capsys.readouterr().err == ""


def test_program_that_imports_the_package_keeps_its_hook():
    assert not isinstance(sys.excepthook, ErrorLine)


def test_command_that_reads_no_knobs_ends_with_the_line_after_its_traceback(tmp_path):
    (tmp_path / "net.json").write_text('{"net": {"_target_": "components.networks.PromptFreeSam", "precision": "x"}}')
    command = [sys.executable, "-m", "monai.bundle", "verify_net_in_out", "net", "--config_file", tmp_path / "net.json"]
    metadata = REPOSITORY / "bundles/autosam_acdc/configs/metadata.json"
    command += ["--meta_file", metadata, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("error: TypeError: ")
    assert "missing 2 required positional arguments: 'encoder' and 'head'" in last_line
