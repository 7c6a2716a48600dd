"""What is read from the command line: which options are refused, and which text a path keeps."""

import contextlib
import functools
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fire
import monai.bundle
import pytest

from components.training.command_line import (
    _read_options,
    check_run_id,
    read_command_line,
    refuse_unknown_knobs,
)

ROOT = Path(__file__).parents[1]
READ = {"_target_": "components.training.read_command_line", "names": "$globals()", "debug": "@debug"}


@pytest.fixture
def configs(tmp_path):
    (tmp_path / "train.json").write_text(
        json.dumps(
            {
                "labelled_cases": 1,
                "output_dir": "eval",
                "debug": False,
                "resume": True,
                "trainable_encoder": False,
                "train": {"trainer": {"max_epochs": 3, "ckpt_dir": "@output_dir", "amp": False, "flags": [False]}},
                "run": [READ, "$print('ran with', @labelled_cases, @output_dir, @train#trainer#ckpt_dir + '/x')"],
            }
        )
    )
    (tmp_path / "overlay.json").write_text(json.dumps({"port": 1, "train#trainer#max_epochs": 4, "resume": "auto"}))
    return tmp_path


def judge(*arguments):
    refuse_unknown_knobs(["monai/bundle/__main__.py", *map(str, arguments)])


def run_bundle(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_line_with_a_misspelt_knob_fails_and_names_the_nearest(configs):
    done = run_bundle("--config_file", configs / "train.json", "--labeled_cases", 5)
    assert done.returncode == 1
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("error: expected options that the configs define, got '--labeled_cases'")
    assert "Did you mean '--labelled_cases'?" in last_line
    assert "Traceback" not in done.stderr
    assert "ran with" not in done.stdout


def test_command_line_with_known_knobs_runs(configs):
    files = f"['{configs / 'train.json'}','{configs / 'overlay.json'}']"
    knobs = ["--labelled-cases", 5, "--port", -1, "--train#trainer#seed", 2, "--run_id", "run"]
    done = run_bundle(f"--config_file={files}", *knobs, "--output-dir", "a#b/@c $d/1e5")
    assert done.returncode == 0, done.stderr
    assert "ran with 5 a#b/@c $d/1e5 a#b/@c $d/1e5/x\n" in done.stdout


@pytest.mark.parametrize("run_id", ["train", "missing", "debug", ""])
def test_a_run_id_that_is_no_workflow_is_refused_naming_those_there_are(configs, run_id):
    with pytest.raises(ValueError, match=f"expected a workflow to run, received '{run_id}': write run$"):
        check_run_id(["", "run", run_id, "--config_file", str(configs / "train.json")])


def test_a_workflow_and_none_at_all_are_fine(configs):
    for arguments in (["run"], ["--run_id", "run"], []):
        check_run_id(["", "run", *arguments, "--config_file", str(configs / "train.json")])


def test_overrides_made_in_code_are_never_judged(configs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["monai/bundle/__main__.py", "run", "--labeled_cases", "5"])
    monai.bundle.run(config_file=str(configs / "train.json"), labeled_cases=5)


def test_every_form_of_a_known_option_passes(configs):
    train = configs / "train.json"
    judge("run", "--config_file", train, "--labelled_cases", "-1")
    judge("run", f"--config_file={train}", "--labelled_cases=--5")
    judge("run", "training", "--config_file", train, "--labelled-cases=5", "--", "--trace")
    judge("run", "--config_file", train, "--train::trainer::new_argument", "5", "--+train#trainer", "{}")
    judge("run", "run", "initialize", "finalize", "metadata.json", train, "--labelled_cases", "2")
    judge("run-workflow", "--workflow_name", "ConfigWorkflow", "--workflow_type=train", "--config_file", train)


def test_tracking_settings_pass(configs):
    settings = ["--tracking", "mlflow", "--experiment_name", "a", "--run_name=b", "--tracking_uri", "c"]
    judge("run", "--config_file", configs / "train.json", *settings)
    with pytest.raises(ValueError, match="got '--experiment_name'"):
        judge("run", "--config_file", configs / "train.json", "--experiment_name", "a")


def test_custom_tracking_settings_pass(configs):
    settings = {"handlers_id": {"trainer": {}}, "configs": {"trainer": {}, "my_server": "x"}}
    (configs / "tracking.json").write_text(json.dumps(settings))
    given = ["run", "--config_file", configs / "train.json", "--tracking", configs / "tracking.json"]
    judge(*given, "--my_server", "y")
    with pytest.raises(ValueError, match="'--trainer'"):
        judge(*given, "--trainer", "y")


def test_knobs_of_all_given_files_pass_and_no_others(configs):
    judge("run", "--config_file", [str(configs / "train.json"), str(configs / "overlay.json")], "--port", "2")
    with pytest.raises(ValueError, match="got '--port'"):
        judge("run", "--config_file", configs / "train.json", "--port", "2")


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_args_file_gives_configs_and_its_own_keys(configs, suffix):
    if suffix == "yaml":
        pytest.importorskip("yaml")
    args_file = configs / f"args.{suffix}"  # JSON is YAML too
    args_file.write_text(json.dumps({"config_file": str(configs / "train.json"), "new_key": 1, "train#trainer#x": 1}))
    judge("run", "--args_file", args_file, "--labelled_cases", "2", "--new_key", "2")
    with pytest.raises(ValueError, match=r"'--new_kex'.*Did you mean '--new_key'\?"):
        judge("run", "--args_file", args_file, "--new_kex", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labeled_cases", "5"], "got '--labeled_cases': no config has the key 'labeled_cases'"),
        (["--labeled-cases=5"], r"got '--labeled-cases=5' \(read as 'labeled_cases' by python-fire\)"),
        (["-labeled_cases", "5"], "got '-labeled_cases'"),
        (["--trian#trainer#max_epochs", "5"], "no config has the key 'trian'. Did you mean '--train'"),
        (
            ["--max_epochs", "5"],
            "The keys are: debug, labelled_cases, output_dir, resume, run, train, trainable_encoder",
        ),
        (["--labelled_cases", "5", "--quick"], "got '--quick'"),
        (["--normal"], r"got '--normal' \(read as 'rmal' by python-fire\)"),
        (["--config_fil", "x"], "Did you mean '--config_file'"),
    ],
)
def test_unknown_option_is_refused(configs, arguments, message):
    with pytest.raises(ValueError, match=message):
        judge("run", "--config_file", configs / "train.json", *arguments)


def test_other_commands_are_not_judged():
    judge("verify_metadata", "--anything", "1")
    judge()


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("training --a 1 --b=2 --c-d 3", "a b c_d"),
        ("--a -1 --b -.5 --c=-inf -d 4 -e=5", "a b c d e"),
        ("--a --b --no_c --nod x --normal", "a b _c nod rmal"),  # a switch is on, or off if its name begins with "no"
        ("--a=--b --c #x --d#e::f 1 --a 2", "a c d"),
        ("x --a y z --b", "a b"),
        ("--a 1 --b 2 -- --trace", "a b"),
        ("--a 1 - --b 2", "a"),
    ],
)
def test_options_are_the_names_that_python_fire_reads(tmp_path, line, keys, capfd):
    def judge_line(*known):
        (tmp_path / "config.json").write_text(json.dumps(dict.fromkeys(known, 0)))
        judge("run", "--config_file", tmp_path / "config.json", *line.split(" "))

    judge_line(*keys.split())
    for key in keys.split():
        with pytest.raises(ValueError, match=f"no config has the key '{key}'"):
            judge_line(*(set(keys.split()) - {key}))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("command", [monai.bundle.run, monai.bundle.run_workflow])
@pytest.mark.parametrize(
    "line",
    [
        "x --a 1e5 -b=[y] --c-d {e: 1} z --run_id",
        "--a --nob --normal --notracking --args_file a#b --a",
        "--a=--b --x#y::z -1 u --config_file= v",
        "- --a 1",
        "--a 1 --b 2 -- --trace",
        "--workflow_name None --a None",
    ],
)
def test_options_have_the_values_that_python_fire_binds(line, command):
    bound = {}

    @functools.wraps(command)
    def record(*values, **options):
        given = zip(inspect.signature(command).parameters, values, strict=False)
        bound.update({name: value for name, value in given if value is not None}, **options)

    arguments = line.split(" ")
    with contextlib.suppress(fire.core.FireExit):
        fire.Fire(record, command=[*fire.parser.SeparateFlagArgs(arguments)[0], "--"])
    options = _read_options(["", command.__name__, *arguments])
    assert {name: option.value for name, option in options.items()} == bound


def test_arguments_file_by_position_is_read(configs):
    (configs / "args.json").write_text(json.dumps({"config_file": str(configs / "train.json")}))
    judge("run_workflow", "ConfigWorkflow", configs / "args.json", "--labelled_cases", "2")
    with pytest.raises(ValueError, match="'--labeled_cases'"):
        judge("run_workflow", "ConfigWorkflow", configs / "args.json", "--labeled_cases", "2")


def values_read(configs, *arguments):
    """The values that options of a command line get in the config other than by python-fire."""
    names = {"__local_refs": {}, "torch": None}
    read_command_line(names, argv=["", "run", "--config_file", str(configs / "train.json"), *map(str, arguments)])
    return names["__local_refs"]


ODD_PATHS = """
run#1|20230712|1e5|0x10|True|(a,b)|[x]|p,q.nii.gz|a b|o'brien/v.nii.gz|run-1|-5|a=b|@host/x|user@host/@x|{v}|a::b
br[1]/{v}*.nii.gz|Herz Übung/心臓 1.nii.gz|a#b/p%1.nii.gz|./$x|1_000|a\\b|~x/y
"""


@pytest.mark.parametrize("text", re.split(r"[|\n]", ODD_PATHS.strip()))
def test_path_keeps_the_text_that_was_typed(configs, text, monkeypatch):
    monkeypatch.chdir(configs)
    (configs / "~x/y").mkdir(parents=True)
    assert values_read(configs, "--output_dir", text) == {"output_dir": text}
    assert values_read(configs, f"--output-dir={text}", "--labelled_cases", 5) == {"output_dir": text}
    assert values_read(configs, "--output_dir", "x", "--output_dir", text) == {"output_dir": text}


@pytest.mark.parametrize(
    "text",
    [
        "$None",
        "$@output_dir + '/x'",
        "$[a for a in torch.y]",
        "@output_dir",
        "@train#trainer",
        "%run",
        "{'_target_': 'x'}",
    ],
)
def test_path_that_configs_evaluate_is_left_to_them(configs, text):
    assert values_read(configs, "--output_dir", text) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "None"], r"ignores `--output_dir None`: write `--output_dir '\$None'`"),
        (["--labelled_cases", "None"], r"write `--labelled_cases '\$None'` for no value"),
        (["--output_dir"], "expected a path after `--output_dir`, got nothing"),
        (["--output_dir", "--labelled_cases", 5], "expected a path after `--output_dir`"),
        (["--nooutput_dir"], "expected a path after `--output_dir`"),
        (["--output_dir="], "is a variable of the shell unset"),
        (["--output_dir=~/runs"], r"the shell left `~` as it is .* write `--output_dir ~/runs`"),
        (["--output_dir", "'12'"], r"the quotes are part of the path .*: leave them out"),
        (["--output_dir", "$x/v.nii.gz"], r"nothing here has the name v, x: write `--output_dir './\$x/v.nii.gz'`"),
        (["--output_dir", "$run 1"], r"it is no Python \(invalid syntax\): write `--output_dir './\$run 1'`"),
        (["--output_dir", "$torch"], r"a file or folder has that name: write `--output_dir './\$torch'`"),
        (["--output_dir", "@x"], "no config has that key: write `--output_dir './@x'`"),
        (["--train#trainer#ckpt_dir", "a#1"], "cannot be kept as it is: .* `./a_1`"),
        (["--train#trainer#ckpt_dir", "2023"], "python-fire reads it as 2023"),
        (["--output_dir", "a#1", "--tracking", "mlflow"], "MONAI's tracking writes `#` as `::`"),
    ],
)
def test_path_that_cannot_be_kept_is_refused(configs, arguments, message, monkeypatch):
    monkeypatch.chdir(configs)
    (configs / "$torch").mkdir()
    with pytest.raises(ValueError, match=message):
        values_read(configs, *arguments)


def test_nested_path_that_needs_no_keeping_passes(configs):
    assert values_read(configs, "--train#trainer#ckpt_dir", "/a/b") == {}


@pytest.mark.parametrize(("text", "truth"), [("true", True), ("TRUE", True), ("false", False), ("fALSE", False)])
def test_truth_value_may_be_written_in_any_case(configs, text, truth):
    for name in ("resume", "trainable_encoder", "labelled_cases"):
        assert values_read(configs, f"--{name}", text) == {name: truth}
        assert values_read(configs, f"--{name.replace('_', '-')}={text}") == {name: truth}


def test_path_named_true_stays_a_path(configs):
    assert values_read(configs, "--output_dir", "true") == {"output_dir": "true"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--resume", "True"],
        ["--resume=False"],
        ["--resume"],
        ["--noresume"],
        ["--resume", "$1 > 2"],
        ["--resume=@debug"],
    ],
)
def test_truth_value_that_python_fire_or_the_configs_read_is_left_to_them(configs, arguments):
    assert values_read(configs, *arguments) == {}


def test_encoder_may_be_trained_in_part(configs):
    assert values_read(configs, "--trainable_encoder", "neck") == {}


@pytest.mark.parametrize(
    ("option", "value"),
    [("resume", "yes"), ("resume", "1"), ("resume", "[True]"), ("debug", "tru"), ("train#trainer#amp", "no")],
)
def test_what_is_no_truth_value_is_refused(configs, option, value):
    message = f"`--{option} .*`: write `--{option} True` or `--{option} False`"
    with pytest.raises(ValueError, match=message):
        values_read(configs, f"--{option}", value)


def test_the_last_file_says_whether_a_knob_is_true_or_false(configs):
    overlay = ["run", "--config_file", f"['{configs / 'train.json'}','{configs / 'overlay.json'}']", "--resume", "yes"]
    read_command_line({"__local_refs": {}}, argv=["", *overlay])  # `auto` in the overlay
    (configs / "overlay.json").write_text(json.dumps({"resume": False}))
    with pytest.raises(ValueError, match="write `--resume True`"):
        read_command_line({"__local_refs": {}}, argv=["", *overlay])


@pytest.mark.parametrize("option", ["train#trainer#amp", "train::trainer::amp", "train#trainer#flags#0", "train#new"])
def test_truth_value_within_another_key_is_written_as_python_does(configs, option):
    assert values_read(configs, f"--{option}", "True") == {}
    with pytest.raises(ValueError, match=f"takes `--{option} true` for text: write `--{option} True`"):
        values_read(configs, f"--{option}", "true")


def test_truth_values_reach_what_the_configs_name(configs):
    config = json.loads((configs / "train.json").read_text())
    config["made"] = {"_target_": "builtins.dict", "resume": "@resume"}
    (configs / "train.json").write_text(json.dumps(config | {"run": [READ, "$print('given', @made, not @resume)"]}))
    done = run_bundle("--config_file", configs / "train.json", "--resume", "false")
    assert done.returncode == 0, done.stderr
    assert "given {'resume': False} True\n" in done.stdout


@pytest.mark.parametrize(("debug", "has_traceback"), [("true", True), ("True", True), ("false", False)])
def test_debug_shows_the_traceback_however_it_is_written(configs, debug, has_traceback):
    done = run_bundle("--config_file", configs / "train.json", "--labeled_cases", 5, "--debug", debug)
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == has_traceback
