"""Files that a training run writes, keeps and resumes from, tested by tiny trainers with given scores."""

import contextlib
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Metric
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.optimizers import WarmupCosineSchedule
from torch.nn.parallel import DistributedDataParallel

from components.base.atomic_write import save_atomically, write_atomically
from components.inference.model_loader import ModelCheckpointLoader
from components.networks.trained_with import attach_training_record
from components.training.averages import AverageUpdates, MeanWithStart
from components.training.checkpoints import TrainingCheckpoints
from components.training.epoch_handlers import LastEpochValidationHandler, StepLimit

NAN = float("nan")
BATCHES = [{"image": torch.ones(2, 3), "label": torch.zeros(2, 1)}] * 2


class GivenScore(Metric):
    """The score that `by_epoch` gives for the epoch of the validation."""

    def __init__(self, by_epoch):
        super().__init__()
        self.by_epoch = by_epoch

    def reset(self):
        pass

    def update(self, output):
        pass

    def compute(self):
        return None

    def completed(self, engine, name):
        engine.state.metrics[name] = self.by_epoch[engine.state.epoch]


def build(
    ckpt_dir,
    *,
    scores=(),
    start=None,
    epochs=3,
    resume=False,
    lr=1.0,
    interval=1,
    val_batches=BATCHES,
    wrap=None,
    batches=BATCHES,
    start_share=None,
    keep_last=False,
):
    """Return a run whose validation at epoch N scores `scores[N - 1]`; without scores it has no validation data.

    With `start` the initial network is validated too, with that score. With `start_share` the mean of the start's
    weights and the trained ones is validated.
    """
    network = torch.nn.Linear(3, 1)
    network = network if wrap is None else wrap(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    scheduler = WarmupCosineSchedule(optimizer, warmup_steps=0, t_total=epochs)
    averaged = None if start_share is None else MeanWithStart(network, start_share)
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=val_batches if scores else [],
        network=network if averaged is None else averaged.mean,
        key_val_metric={"score": GivenScore({0: start, **dict(enumerate(scores, 1))})},
    )
    handler = TrainingCheckpoints(
        ckpt_dir=ckpt_dir,
        network=network,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        evaluator=evaluator,
        resume=resume,
        validate_start=start is not None,
        keep_last=keep_last,
    )
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=batches,
        network=network,
        optimizer=optimizer,
        loss_function=torch.nn.MSELoss(),
        train_handlers=[
            *([] if averaged is None else [AverageUpdates(averaged)]),
            LastEpochValidationHandler(interval, evaluator),
            LrScheduleHandler(scheduler, print_lr=False),
            handler,
        ],
    )
    seen = []  # (epoch, learning rate) of every epoch trained
    trainer.add_event_handler(
        Events.EPOCH_STARTED, lambda e: seen.append((e.state.epoch, optimizer.param_groups[0]["lr"]))
    )
    return SimpleNamespace(
        trainer=trainer, evaluator=evaluator, handler=handler, network=network, optimizer=optimizer, seen=seen
    )


def train(ckpt_dir, **options):
    run = build(ckpt_dir, **options)
    run.trainer.run()
    return run


def stop_after(run, epoch):
    """Train until the epoch's checkpoint is written, then fail as if killed."""

    def fail(_):
        raise InterruptedError

    run.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=epoch), fail)
    with pytest.raises(InterruptedError):
        run.trainer.run()
    return run


def load(path):
    return torch.load(path, weights_only=True)


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name != ".training.lock")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_fresh_run_keeps_the_best_model_and_the_last_two_checkpoints(tmp_path):
    run = train(tmp_path / "new" / "folder", scores=[0.2, 0.9, 0.5, 0.6], epochs=4)
    folder = tmp_path / "new" / "folder"
    assert names(folder) == ["checkpoint_epoch=3.pt", "checkpoint_epoch=4.pt", "model.pt"]
    last = load(folder / "checkpoint_epoch=4.pt")
    assert (last["epoch"], last["iteration"], last["best_score"], last["best_epoch"]) == (4, 8, 0.9, 2)
    assert same(last["model"], weights(run.network))
    assert not same(load(folder / "model.pt"), last["model"])


def test_last_validated_model_is_kept_whatever_its_score(tmp_path, caplog):
    caplog.set_level("INFO")
    run = train(tmp_path, start=0.9, scores=[0.5, 0.2, math.nan], keep_last=True)
    assert "epoch 2: last validation score, 0.2, model saved" in caplog.text
    assert (run.handler.start_score, run.handler.best_score, run.handler.best_epoch) == (0.9, 0.2, 2)
    assert same(load(tmp_path / "model.pt"), load(tmp_path / "checkpoint_epoch=2.pt")["model"])
    resumed = train(tmp_path, start=0.9, scores=[0.5, 0.2, math.nan, 0.1], keep_last=True, resume=True, epochs=4)
    assert (resumed.handler.best_score, resumed.handler.best_epoch) == (0.1, 4)
    assert same(load(tmp_path / "model.pt"), weights(resumed.network))


def test_validated_mean_with_the_start_becomes_the_model(tmp_path):
    run = build(tmp_path, scores=[0.5, 0.9], epochs=2, start_share=0.25)
    start = weights(run.network)
    run.trainer.run()
    trained = load(tmp_path / "checkpoint_epoch=2.pt")["model"]
    assert same(trained, weights(run.network))
    expected = {name: 0.25 * start[name] + 0.75 * trained[name] for name in start}
    torch.testing.assert_close(load(tmp_path / "model.pt"), expected)


def test_run_resumed_after_its_last_epoch_writes_the_mean_of_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    train(tmp_path, start_share=0.25)
    written = load(tmp_path / "model.pt")
    (tmp_path / "model.pt").unlink()
    torch.manual_seed(0)
    train(tmp_path, resume=True, start_share=0.25)
    assert same(load(tmp_path / "model.pt"), written)


def fail_at_writing(run, path, epoch):
    """Train until an epoch whose file cannot be written, because a folder has its name, and remove that folder."""

    def put_a_folder(_):
        path.unlink(missing_ok=True)
        path.mkdir()

    run.trainer.add_event_handler(Events.EPOCH_STARTED(once=epoch), put_a_folder)
    with pytest.raises(IsADirectoryError):
        run.trainer.run()
    path.rmdir()


def test_no_checkpoint_records_the_score_of_a_model_that_was_not_written(tmp_path):
    fail_at_writing(build(tmp_path, scores=[0.1, 0.9, 0.2]), tmp_path / "model.pt", epoch=2)
    assert names(tmp_path) == ["checkpoint_epoch=1.pt"]


def test_run_that_ends_between_its_model_and_its_checkpoint_leaves_a_usable_folder(tmp_path):
    run = build(tmp_path, scores=[0.1, 0.9, 0.2])
    fail_at_writing(run, tmp_path / "checkpoint_epoch=2.pt", epoch=2)
    assert names(tmp_path) == ["checkpoint_epoch=1.pt", "model.pt"]
    assert same(load(tmp_path / "model.pt"), weights(run.network))
    resumed = train(tmp_path, scores=[0.1, 0.9, 0.2], resume=True)
    assert [epoch for epoch, _ in resumed.seen] == [2, 3]
    assert (resumed.handler.best_score, resumed.handler.best_epoch) == (0.9, 2)


def test_resumed_run_ends_like_an_unbroken_one(tmp_path):
    torch.manual_seed(0)
    unbroken = train(tmp_path / "unbroken", scores=[0.1] * 4, epochs=4)
    torch.manual_seed(0)
    broken = stop_after(build(tmp_path / "broken", scores=[0.1] * 4, epochs=4), 2)
    resumed = train(tmp_path / "broken", scores=[0.1] * 4, epochs=4, resume=True)
    assert broken.seen + resumed.seen == unbroken.seen
    assert [epoch for epoch, _ in resumed.seen] == [3, 4]
    assert resumed.trainer.state.iteration == unbroken.trainer.state.iteration == 8
    for name, value in unbroken.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value, rtol=0, atol=1e-6)


def test_resumed_run_follows_the_new_learning_rate_and_number_of_epochs(tmp_path):
    train(tmp_path, scores=[0.1] * 2, epochs=2, lr=1.0)
    resumed = train(tmp_path, scores=[0.1] * 4, epochs=4, lr=0.1, resume=True)
    # half a cosine over 4 epochs: 1, 0.854, 0.5, 0.146 of the base
    assert [epoch for epoch, _ in resumed.seen] == [3, 4]
    assert [lr for _, lr in resumed.seen] == pytest.approx([0.05, 0.0146447], rel=1e-5)


def test_resumed_run_follows_the_new_optimizer_options(tmp_path):
    train(tmp_path, scores=[0.1] * 3)
    resumed = build(tmp_path, scores=[0.1] * 3, resume=True)
    resumed.optimizer.param_groups[0]["weight_decay"] = 0.25
    resumed.trainer.run()
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.25


@pytest.mark.filterwarnings("error:.*lr_scheduler.step")
def test_resuming_warns_of_no_step_out_of_order(tmp_path):
    train(tmp_path, scores=[0.1] * 3)
    train(tmp_path, scores=[0.1] * 4, epochs=4, resume=True)


def test_resumed_epochs_are_whole_when_there_are_more_batches_than_before(tmp_path):
    train(tmp_path, scores=[0.1], epochs=1, batches=BATCHES)
    resumed = train(tmp_path, scores=[0.1] * 3, epochs=3, batches=BATCHES[:1] * 5, resume=True)
    assert [epoch for epoch, _ in resumed.seen] == [2, 3]
    assert resumed.trainer.state.iteration == 15


@pytest.mark.parametrize("new_scores", [[0.0, 0.0, 0.0, 0.89], [0.0, 0.0, 0.0, NAN]])
def test_worse_model_never_replaces_the_best_after_resume(tmp_path, new_scores):
    train(tmp_path, scores=[0.2, 0.9, 0.5])
    best = load(tmp_path / "model.pt")
    resumed = train(tmp_path, scores=new_scores, epochs=4, resume=True)
    assert same(load(tmp_path / "model.pt"), best)
    assert (resumed.evaluator.state.best_metric, resumed.evaluator.state.best_metric_epoch) == (0.9, 2)
    assert load(tmp_path / "checkpoint_epoch=4.pt")["best_score"] == 0.9


def test_better_model_replaces_the_best_after_resume(tmp_path):
    train(tmp_path, scores=[0.2, 0.9, 0.5])
    resumed = train(tmp_path, scores=[0.0, 0.0, 0.0, 0.91], epochs=4, resume=True)
    assert same(load(tmp_path / "model.pt"), weights(resumed.network))
    assert (resumed.evaluator.state.best_metric, resumed.evaluator.state.best_metric_epoch) == (0.91, 4)


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b""), lambda path: torch.save({}, path)])
def test_unreadable_newest_checkpoint_is_skipped_by_name(tmp_path, caplog, damage):
    train(tmp_path, scores=[0.1] * 3)
    damage(tmp_path / "checkpoint_epoch=3.pt")
    with caplog.at_level(logging.WARNING):
        resumed = train(tmp_path, scores=[0.1] * 4, epochs=4, resume=True)
    assert [epoch for epoch, _ in resumed.seen] == [3, 4]
    assert "skipping the unreadable checkpoint" in caplog.text
    assert "checkpoint_epoch=3.pt" in caplog.text


def test_unreadable_newer_files_do_not_count_among_the_two_kept(tmp_path):
    train(tmp_path, scores=[0.1] * 2, epochs=2)
    (tmp_path / "checkpoint_epoch=9.pt").write_bytes(b"half")
    train(tmp_path, scores=[0.1] * 3, epochs=3, resume=True)
    assert names(tmp_path)[:3] == ["checkpoint_epoch=2.pt", "checkpoint_epoch=3.pt", "checkpoint_epoch=9.pt"]


def test_epoch_ten_is_newer_than_epoch_nine(tmp_path):
    train(tmp_path, scores=[0.1] * 10, epochs=10)
    assert names(tmp_path) == ["checkpoint_epoch=10.pt", "checkpoint_epoch=9.pt", "model.pt"]
    assert train(tmp_path, scores=[0.1] * 11, epochs=11, resume=True).seen[0][0] == 11


def test_fresh_run_in_a_used_folder_moves_older_checkpoints_aside(tmp_path, caplog):
    train(tmp_path, scores=[0.9] * 3)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(tmp_path, scores=[0.5] * 2, epochs=2)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, scores=[0.4], epochs=1)
    assert names(tmp_path) == ["checkpoint_epoch=1.pt", "model.pt", "previous_run_1", "previous_run_2"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "previous_run_1").iterdir()} == first
    assert names(tmp_path / "previous_run_2") == ["checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt", "model.pt"]
    assert "previous_run_2" in caplog.text
    assert load(tmp_path / "checkpoint_epoch=1.pt")["best_score"] == 0.4


def test_older_model_stays_until_the_fresh_run_writes_its_own(tmp_path):
    train(tmp_path, scores=[0.9] * 3)
    older = load(tmp_path / "model.pt")
    fresh = stop_after(build(tmp_path, scores=[0.1, 0.1], epochs=2, interval=2), 1)
    assert same(load(tmp_path / "model.pt"), older)
    assert fresh.handler.best_score is None


def test_set_aside_run_can_be_resumed_in_its_folder(tmp_path):
    train(tmp_path, scores=[0.9] * 3)
    train(tmp_path, scores=[0.1], epochs=1)
    resumed = train(tmp_path / "previous_run_1", scores=[0.1] * 4, epochs=4, resume=True)
    assert resumed.handler.best_score == 0.9


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_lost_best_model_resets_the_best_score(tmp_path, caplog, damage):
    train(tmp_path, scores=[0.9] * 3)
    damage(tmp_path / "model.pt")
    with caplog.at_level(logging.WARNING):
        resumed = train(tmp_path, scores=[0.1] * 4, epochs=4, resume=True)
    assert "model.pt, is missing or unreadable" in caplog.text
    assert same(load(tmp_path / "model.pt"), weights(resumed.network))
    assert (resumed.evaluator.state.best_metric, resumed.evaluator.state.best_metric_epoch) == (0.1, 4)


@pytest.mark.parametrize("steps", [4, 5, 6])
def test_a_training_makes_as_many_steps_as_it_is_given_and_the_last_epoch_is_validated(tmp_path, steps):
    run = build(tmp_path, scores=[0.1, 0.2, 0.3], batches=[BATCHES[0]] * 2, epochs=-(-steps // 2))
    StepLimit(steps).attach(run.trainer)
    run.trainer.run()
    assert run.trainer.state.iteration == steps
    assert run.evaluator.state.epoch == run.trainer.state.max_epochs == len(run.seen)
    assert load(tmp_path / f"checkpoint_epoch={len(run.seen)}.pt")["iteration"] == steps


def test_resume_in_an_empty_folder_says_so_and_starts_fresh(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = train(tmp_path, scores=[0.1] * 3, resume=True)
    assert "no checkpoint to resume from" in caplog.text
    assert [epoch for epoch, _ in run.seen] == [1, 2, 3]


def test_resume_with_nothing_readable_starts_fresh_and_keeps_the_files(tmp_path):
    (tmp_path / "checkpoint_epoch=1.pt").write_bytes(b"half")
    train(tmp_path, scores=[0.1] * 3, resume=True)
    assert (tmp_path / "previous_run_1" / "checkpoint_epoch=1.pt").read_bytes() == b"half"


def test_resuming_a_finished_run_ends_at_once(tmp_path):
    train(tmp_path, scores=[0.1] * 3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    resumed = train(tmp_path, scores=[0.1] * 3, resume=True)
    assert resumed.seen == []
    assert (resumed.evaluator.state.best_metric, resumed.evaluator.state.best_metric_epoch) == (0.1, 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_checkpoint_beyond_the_last_epoch_is_an_error(tmp_path):
    train(tmp_path, scores=[0.1] * 3)
    with pytest.raises(ValueError, match=r"within the 2 epochs.*checkpoint_epoch=3\.pt.*--epochs"):
        train(tmp_path, scores=[0.1] * 2, epochs=2, resume=True)


def test_checkpoint_of_another_network_is_an_error_that_names_the_file(tmp_path):
    train(tmp_path, scores=[0.1] * 3)
    with pytest.raises(RuntimeError, match=r"(?s)size mismatch.*checkpoint_epoch=3\.pt.*--resume False"):
        train(tmp_path, epochs=4, resume=True, wrap=lambda _: torch.nn.Linear(3, 2))


def test_a_run_does_not_resume_what_was_trained_otherwise_and_the_loader_refuses_it_too(tmp_path):
    def cropped(size):
        def wrap(network):
            attach_training_record(network, {"crop_size": size})
            return network

        return wrap

    build(tmp_path, scores=[0.5], epochs=1, wrap=cropped(96)).trainer.run()
    resumed = build(tmp_path, scores=[0.5, 0.6], epochs=2, resume=True, wrap=cropped(64))
    with pytest.raises(RuntimeError, match=r"(?s)trained with crop_size 96, received 64.*checkpoint_epoch=1\.pt"):
        resumed.trainer.run()
    loader = ModelCheckpointLoader(str(tmp_path / "model.pt"), {"model": resumed.network})
    with pytest.raises(Exception, match="trained with crop_size 96, received 64"):
        loader(resumed.evaluator)
    build(tmp_path, scores=[0.5, 0.6], epochs=2, resume=True, wrap=cropped(96)).trainer.run()


def test_first_score_counts_even_if_zero_and_nan_never_does(tmp_path):
    run = train(tmp_path, scores=[NAN, 0.0, NAN])
    assert (run.handler.best_score, run.handler.best_epoch) == (0.0, 2)
    assert (run.evaluator.state.best_metric, run.evaluator.state.best_metric_epoch) == (0.0, 2)
    assert not same(load(tmp_path / "model.pt"), weights(run.network))


@pytest.mark.parametrize("scores", [(), (NAN, NAN, NAN)])
def test_without_any_score_the_last_model_is_kept(tmp_path, caplog, scores):
    with caplog.at_level(logging.INFO):
        run = train(tmp_path, scores=scores)
    assert same(load(tmp_path / "model.pt"), weights(run.network))
    assert "no validation gave a score" in caplog.text


def test_without_evaluator_the_last_model_is_kept(tmp_path):
    run = build(tmp_path)
    run.handler.evaluator = None
    run.trainer.run()
    assert same(load(tmp_path / "model.pt"), weights(run.network))


def test_epoch_without_validation_reuses_no_older_score(tmp_path):
    run = build(tmp_path, scores=[0.1, 0.2, 0.3, 0.4, 0.2], epochs=5, interval=3)
    run.evaluator.metric_cmp_fn = float.__ge__  # an equal score is better, so a second look at the same one would show
    run.trainer.run()
    assert load(tmp_path / "checkpoint_epoch=4.pt")["best_epoch"] == 3
    assert (run.handler.best_score, run.handler.best_epoch) == (0.3, 3)


@pytest.mark.parametrize(("interval", "validated"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4]), (9, [4])])
def test_validation_runs_at_every_interval_and_once_after_the_last_epoch(tmp_path, interval, validated):
    run = build(tmp_path, scores=[0.1] * 4, epochs=4, interval=interval)
    epochs = []
    run.evaluator.add_event_handler(Events.COMPLETED, lambda engine: epochs.append(engine.state.epoch))
    run.trainer.run()
    assert epochs == validated


def test_validation_interval_below_one_is_an_error():
    with pytest.raises(ValueError, match="interval must be 1"):
        LastEpochValidationHandler(0)


@pytest.mark.parametrize(
    ("start", "scores", "best"),
    [(0.8, [0.1, 0.5, 0.8], (0.8, 0)), (0.8, [0.1, 0.9, 0.5], (0.9, 2)), (NAN, [0.1, 0.5, 0.2], (0.5, 2))],
    ids=["never beaten", "beaten", "nan"],
)
def test_model_is_never_worse_than_what_the_run_began_with(tmp_path, start, scores, best):
    run = build(tmp_path, start=start, scores=scores)
    began_with = weights(run.network)
    run.trainer.run()
    assert (run.handler.best_score, run.handler.best_epoch) == best
    assert (run.evaluator.state.best_metric, run.evaluator.state.best_metric_epoch) == best
    assert same(load(tmp_path / "model.pt"), began_with) == (best[1] == 0)
    last = load(tmp_path / "checkpoint_epoch=3.pt")
    assert (last["best_score"], last["best_epoch"]) == best


def test_start_is_validated_once_before_the_first_step_and_not_after_resuming(tmp_path):
    first = build(tmp_path, start=0.8, scores=[0.1] * 3)
    steps_before = []
    first.evaluator.add_event_handler(
        Events.COMPLETED, lambda engine: steps_before.append((engine.state.epoch, first.trainer.state.iteration))
    )
    stop_after(first, 2)
    assert steps_before == [(0, 0), (1, 2), (2, 4)]
    began_with = load(tmp_path / "model.pt")
    resumed = build(tmp_path, start=0.9, scores=[0.1] * 3, resume=True)
    epochs = []
    resumed.evaluator.add_event_handler(Events.COMPLETED, lambda engine: epochs.append(engine.state.epoch))
    resumed.trainer.run()
    assert epochs == [3]
    assert (resumed.handler.best_score, resumed.handler.best_epoch) == (0.8, 0)
    assert same(load(tmp_path / "model.pt"), began_with)


def test_score_before_training_is_kept_beside_the_best_one(tmp_path):
    first = build(tmp_path, start=0.2, scores=[0.5] * 3)
    stop_after(first, 2)
    resumed = train(tmp_path, start=0.9, scores=[0.6] * 3, resume=True)
    assert (resumed.handler.start_score, resumed.handler.best_score) == (0.2, 0.6)
    assert train(tmp_path / "none", scores=[0.5] * 3).handler.start_score is None


def test_run_killed_between_its_start_and_its_first_checkpoint_starts_afresh(tmp_path):
    killed = build(tmp_path, start=0.8, scores=[0.1] * 3)
    killed.trainer.add_event_handler(Events.EPOCH_STARTED, lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        killed.trainer.run()
    assert names(tmp_path) == ["model.pt"]
    resumed = train(tmp_path, start=0.3, scores=[0.1] * 3, resume=True)
    assert (resumed.handler.best_score, resumed.handler.best_epoch) == (0.3, 0)
    assert len(resumed.seen) == 3


@pytest.mark.parametrize("has_evaluator", [True, False])
def test_start_without_validation_data_does_no_harm(tmp_path, has_evaluator):
    run = build(tmp_path, start=0.8, scores=())
    run.handler.evaluator = run.evaluator if has_evaluator else None
    run.trainer.run()
    assert same(load(tmp_path / "model.pt"), weights(run.network))


def test_trainer_that_runs_on_in_code_keeps_its_folder(tmp_path):
    run = train(tmp_path, scores=[0.3, 0.2, 0.1], epochs=2)
    run.trainer.state.max_epochs = 3
    run.trainer.run()
    assert names(tmp_path) == ["checkpoint_epoch=2.pt", "checkpoint_epoch=3.pt", "model.pt"]
    assert load(tmp_path / "checkpoint_epoch=3.pt")["best_score"] == 0.3


class FailsToBeSaved:
    def __reduce__(self):
        raise OSError("disk full")


def test_failed_write_leaves_the_older_file_and_nothing_else(tmp_path):
    path = tmp_path / "model.pt"
    save_atomically({"a": 1}, path)
    with pytest.raises(OSError, match="disk full"):
        save_atomically({"a": 2, "b": FailsToBeSaved()}, path)
    assert names(tmp_path) == ["model.pt"]
    assert load(path) == {"a": 1}


def test_write_swaps_the_file_instead_of_filling_it(tmp_path):
    path, reader = tmp_path / "model.pt", tmp_path / "reader.pt"
    save_atomically({"a": 1}, path)
    reader.hardlink_to(path)  # stands for a process that has the older file open
    save_atomically({"a": 2}, path)
    assert (load(reader), load(path)) == ({"a": 1}, {"a": 2})


def test_partial_files_of_a_killed_run_are_removed_at_start(tmp_path):
    for name in (".partial-1-model.pt", ".partial-1-checkpoint_epoch=7.pt", "mine.pt"):
        (tmp_path / name).write_bytes(b"half")
    train(tmp_path, scores=[0.1], epochs=1)
    assert names(tmp_path) == ["checkpoint_epoch=1.pt", "mine.pt", "model.pt"]


def test_a_second_training_is_refused_and_a_killed_one_resumes(tmp_path):
    script = (
        "import sys, time; sys.path[:0] = sys.argv[2:]; import test_checkpoints as t\n"
        "from ignite.engine import Events\n"
        "run = t.build(sys.argv[1], scores=[0.5] * 1000, epochs=1000)\n"
        "run.trainer.add_event_handler(Events.ITERATION_STARTED, lambda _: time.sleep(0.01))\n"
        "run.trainer.run()"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    killed = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path, *paths], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("checkpoint_epoch=[4-9].pt")):
            assert killed.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match=rf"process {killed.pid} on .* trains in {tmp_path}.*--ckpt_dir FOLDER"):
            train(tmp_path, scores=[0.9])
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    reached = max(int(path.stem.split("=")[1]) for path in tmp_path.glob("checkpoint_epoch=*.pt"))
    resumed = train(tmp_path, scores=[0.1] * (reached + 2), epochs=reached + 2, resume=True)
    assert [epoch for epoch, _ in resumed.seen] == [reached + 1, reached + 2]
    assert resumed.handler.best_score == 0.5
    assert names(tmp_path) == sorted([f"checkpoint_epoch={reached + n}.pt" for n in (1, 2)] + ["model.pt"])


@pytest.fixture
def process_group(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    idist.finalize()  # destroys the group; ignite would not notice torch's own call


@pytest.mark.usefixtures("process_group")
def test_wrapped_network_is_saved_and_resumed_bare(tmp_path):
    folder = tmp_path / "models"
    train(folder, scores=[0.1] * 3, wrap=DistributedDataParallel)
    assert (
        load(folder / "model.pt").keys() == load(folder / "checkpoint_epoch=3.pt")["model"].keys() == {"weight", "bias"}
    )
    assert train(folder, scores=[0.1] * 4, epochs=4, wrap=DistributedDataParallel, resume=True).seen[0][0] == 4
    assert train(folder, scores=[0.1] * 5, epochs=5, resume=True).seen[0][0] == 5


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    train(tmp_path, scores=[0.1] * 3)
    assert names(tmp_path) == []


def test_schedule_that_follows_a_metric_is_an_error(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    with pytest.raises(TypeError, match="ReduceLROnPlateau"):
        TrainingCheckpoints(
            ckpt_dir=tmp_path,
            network=torch.nn.Identity(),
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        )


def load_into(network, path):
    engine = SimpleNamespace(state=SimpleNamespace(max_epochs=1, epoch=0))
    ModelCheckpointLoader(load_path=str(path), load_dict={"model": network})(engine)


@pytest.mark.parametrize("file", ["model.pt", "checkpoint_epoch=3.pt"])
def test_loader_reads_the_network_that_training_wrote(tmp_path, file):
    run = train(tmp_path)
    network = torch.nn.Linear(3, 1)
    load_into(network, tmp_path / file)
    assert same(weights(network), weights(run.network))


def test_loader_without_a_file_says_to_train_first(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.pt.*monai\.bundle run training.*--ckpt_path FILE"):
        load_into(torch.nn.Linear(3, 1), tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_loader_names_a_damaged_file(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pt is not a readable checkpoint \(\w+: .*--ckpt_path FILE"):
        load_into(torch.nn.Linear(3, 1), tmp_path / "model.pt")


def test_loader_names_a_file_of_another_network_and_what_does_not_fit(tmp_path):
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt does not fit this network: .*size mismatch for weight"):
        load_into(torch.nn.Linear(3, 1), tmp_path / "model.pt")


def test_loader_refuses_weights_that_are_not_finite(tmp_path):
    state = torch.nn.Linear(3, 1).state_dict()
    state["weight"][0, 1] = torch.nan
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"model\.pt has weights that are not finite: .* in 1 of its 2 tensors \(weight\)"
    ):
        load_into(torch.nn.Linear(3, 1), tmp_path / "model.pt")


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond 4 kB, as if there were no more space; within a test, since pytest writes too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_is_named_and_the_older_file_stays(tmp_path):
    path = tmp_path / "model.pt"
    save_atomically({"a": 1}, path)
    message = "cannot be written: the disk, or a quota on it, is full"
    with pytest.raises(OSError, match=rf"model\.pt {message} \(\d+ MiB free\)"), full_disk():
        save_atomically({"a": torch.zeros(100_000)}, path)
    with (
        pytest.raises(OSError, match=rf"table\.csv {message}"),
        full_disk(),
        write_atomically(tmp_path / "table.csv") as partial,
    ):
        partial.write_text("x" * 100_000)
    assert names(tmp_path) == ["model.pt"]
    assert load(path) == {"a": 1}
