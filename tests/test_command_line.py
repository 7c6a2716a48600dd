"""Which command lines `refuse_unknown_knobs` accepts and which it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import monai.bundle
import pytest

from components.training.command_line import refuse_unknown_knobs

ROOT = Path(__file__).parents[1]
REFUSE = {"_target_": "components.training.refuse_unknown_knobs"}


@pytest.fixture
def configs(tmp_path):
    (tmp_path / "train.json").write_text(
        json.dumps(
            {
                "labelled_patients": 1,
                "train": {"trainer": {"max_epochs": 3}},
                "run": [REFUSE, "$print('ran with', @labelled_patients)"],
            }
        )
    )
    (tmp_path / "overlay.json").write_text(json.dumps({"port": 1, "train#trainer#max_epochs": 4}))
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
    done = run_bundle("--config_file", configs / "train.json", "--labeled_patients", 5)
    assert done.returncode != 0
    assert "got '--labeled_patients'" in done.stderr
    assert "Did you mean '--labelled_patients'?" in done.stderr
    assert "ran with" not in done.stdout


def test_command_line_with_known_knobs_runs(configs):
    files = f"['{configs / 'train.json'}','{configs / 'overlay.json'}']"
    done = run_bundle(
        f"--config_file={files}", "--labelled-patients", 5, "--port", -1, "--train#trainer#seed", 2, "--run_id", "run"
    )
    assert done.returncode == 0, done.stderr
    assert "ran with 5" in done.stdout


def test_overrides_made_in_code_are_never_judged(configs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["monai/bundle/__main__.py", "run", "--labeled_patients", "5"])
    monai.bundle.run(config_file=str(configs / "train.json"), labeled_patients=5)


def test_every_form_of_a_known_option_passes(configs):
    train = configs / "train.json"
    judge("run", "--config_file", train, "--labelled_patients", "-1")
    judge("run", f"--config_file={train}", "--labelled_patients=--5")
    judge("run", "training", "--config_file", train, "--labelled-patients=5", "--", "--trace")
    judge("run", "--config_file", train, "--train::trainer::new_argument", "5", "--+train#trainer", "{}")
    judge("run", "run", "initialize", "finalize", "metadata.json", train, "--labelled_patients", "2")
    judge("run-workflow", "--workflow_name", "ConfigWorkflow", "--workflow_type=train", "--config_file", train)


def test_tracking_settings_pass(configs):
    settings = ["--tracking", "mlflow", "--experiment_name", "a", "--run_name=b", "--tracking_uri", "c"]
    judge("run", "--config_file", configs / "train.json", *settings)


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
    judge("run", "--args_file", args_file, "--labelled_patients", "2", "--new_key", "2")
    with pytest.raises(ValueError, match=r"'--new_kex'.*Did you mean '--new_key'\?"):
        judge("run", "--args_file", args_file, "--new_kex", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labeled_patients", "5"], "got '--labeled_patients': no config has the key 'labeled_patients'"),
        (["--labeled-patients=5"], r"got '--labeled-patients=5' \(read as 'labeled_patients' by python-fire\)"),
        (["-labeled_patients", "5"], "got '-labeled_patients'"),
        (["--trian#trainer#max_epochs", "5"], "no config has the key 'trian'. Did you mean '--train'"),
        (["--max_epochs", "5"], "The keys are: labelled_patients, run, train"),
        (["--labelled_patients", "5", "--quick"], "got '--quick'"),
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


def test_arguments_file_by_position_is_read(configs):
    (configs / "args.json").write_text(json.dumps({"config_file": str(configs / "train.json")}))
    judge("run_workflow", "ConfigWorkflow", configs / "args.json", "--labelled_patients", "2")
    with pytest.raises(ValueError, match="'--labeled_patients'"):
        judge("run_workflow", "ConfigWorkflow", configs / "args.json", "--labeled_patients", "2")
