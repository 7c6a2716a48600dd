"""Phantoms in the batches of a training on real slices."""

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines import default_prepare_batch
from torch.overrides import TorchFunctionMode

from components.data.slices import SliceDataset
from components.phantom.slices import phantom_slices
from components.training.averages import ExponentialMovingAverage
from components.training.epoch_handlers import EpochSeeds
from components.training.mean_teacher import PseudoLabelCutMix
from components.training.phantom_mixing import PhantomMixing

SIZE = 32


class RandomTensors(TorchFunctionMode):
    """Counts the random tensors drawn while it is active; no phantom can be drawn without any."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.rand, torch.randn)
        return func(*args, **(kwargs or {}))


def batch_of(count, *, size=SIZE, **types):
    """Real slices, each with one grey value and one class."""
    values = torch.arange(count, **types).view(-1, 1, 1, 1)
    return {"image": values.expand(-1, 3, size, size).clone(), "label": (values % 4).expand(-1, 1, size, size).clone()}


def phantoms_of(mix, batch):
    images, labels = mix(batch)
    return images[len(batch["image"]) :], labels[len(batch["image"]) :]


@pytest.mark.parametrize(
    ("real", "share", "added"), [(4, 0.5, 4), (4, 0.75, 12), (4, 0.9, 36), (4, 0.2, 1), (1, 0.2, 0), (3, 0.5, 3)]
)
def test_real_slices_all_stay_and_phantoms_make_up_their_share(real, share, added):
    batch = batch_of(real, dtype=torch.float32)
    images, labels = PhantomMixing(share, pool_size=5)(batch)
    assert images.shape == (real + added, 3, SIZE, SIZE)
    assert labels.shape == (real + added, 1, SIZE, SIZE)
    assert torch.equal(images[:real], batch["image"])
    assert torch.equal(labels[:real], batch["label"])


def test_phantoms_are_grey_slices_with_the_four_labels():
    images, labels = phantoms_of(PhantomMixing(0.75, pool_size=12), batch_of(4, size=64, dtype=torch.float32))
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert torch.equal(images, images.round())
    assert images.max() > 200
    assert set(labels.unique().tolist()) == {0, 1, 2, 3}


def test_share_of_zero_is_monais_own_preparation_and_draws_nothing():
    plain = batch_of(2, dtype=torch.float32)
    batches = [plain, {"image": plain["image"]}, plain["image"], (plain["image"], plain["label"])]
    batches.append({key: MetaTensor(value, meta={"name": key}) for key, value in plain.items()})
    for batch in batches:
        with RandomTensors() as drawn:
            given = PhantomMixing(0)(batch, "cpu")
        assert drawn.count == 0
        expected = default_prepare_batch(batch, "cpu")
        for value, other in zip(given, expected, strict=True):
            assert type(value) is type(other)
            assert value is None or torch.equal(value, other)
    assert given[0].meta["name"] == "image"


def test_every_phantom_comes_once_before_any_comes_again():
    mix, batch = PhantomMixing(0.5, pool_size=6), batch_of(4, dtype=torch.float32)
    images = torch.cat([phantoms_of(mix, batch)[0] for _ in range(6)])
    names = [hash(image.numpy().tobytes()) for image in images]
    rounds = [names[start : start + 6] for start in range(0, 24, 6)]
    assert all(set(names) == set(one) for one in rounds)
    assert len(set(names)) == 6
    assert len({tuple(one) for one in rounds}) > 1


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_phantoms_go_on_where_an_unbroken_run_would_be(share):
    unbroken, resumed = (PhantomMixing(share, pool_size=6) for _ in range(2))
    batch = batch_of(4, dtype=torch.float32)
    for _ in range(3):
        unbroken(batch)
    resumed.go_to(12)
    assert torch.equal(resumed(batch)[0], unbroken(batch)[0])


def test_equal_seeds_mix_alike_and_others_do_not():
    batch = batch_of(4, dtype=torch.float32)
    first, again, other = (PhantomMixing(0.5, pool_size=8, seed=seed) for seed in (1, 1, 2))
    for _ in range(3):
        images, labels = first(batch)
        for value, same in zip((images, labels), again(batch), strict=True):
            assert torch.equal(value, same)
        assert not torch.equal(images, other(batch)[0])


def test_each_phantom_is_drawn_once_when_it_is_needed():
    mix, batch = PhantomMixing(0.5, pool_size=70), batch_of(20, dtype=torch.float32)
    images, draws = [], []
    for _ in range(5):
        with RandomTensors() as drawn:
            images.append(phantoms_of(mix, batch)[0][:, :1])
        draws.append(drawn.count > 0)
    assert draws == [True, True, False, True, False]  # 32, 64 and 70 drawn for the first 20, 40 and 70 phantoms
    drawn_here = [phantom_slices(count, seed=0, index=index, size=SIZE)[0] for index, count in enumerate((32, 32, 6))]
    assert torch.equal(torch.cat(images)[:70], torch.cat(drawn_here))


def test_batch_of_another_size_gets_phantoms_of_that_size():
    mix = PhantomMixing(0.5, pool_size=4)
    for size in (32, 48, 32):
        assert mix(batch_of(2, size=size, dtype=torch.float32))[0].shape == (4, 3, size, size)


def test_mixed_batch_has_the_real_ones_types_and_no_metadata():
    batch = batch_of(2, dtype=torch.float32)
    batch = {key: MetaTensor(value, meta={"name": key}) for key, value in batch.items()}
    images, labels = PhantomMixing(0.5, pool_size=4)(batch, "cpu", False, dtype=torch.float64)
    assert type(images) is type(labels) is torch.Tensor
    assert images.dtype == labels.dtype == torch.float64


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan"), "half"])
def test_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"from 0 up to below 1, received .*--phantom_share 0\.5"):
        PhantomMixing(share)


def test_batch_that_no_phantom_fits_is_refused():
    batch = batch_of(2, dtype=torch.float32)
    for unfit in ({"image": batch["image"]}, {key: value[:, :, 1:] for key, value in batch.items()}):
        with pytest.raises(ValueError, match=r"square labelled slices only.*--phantom_share 0"):
            PhantomMixing(0.5, pool_size=4)(unfit)


def test_phantoms_are_mixed_with_hearts_only():
    PhantomMixing(0, class_names=["left", "right"])
    with pytest.raises(
        ValueError, match=r"phantoms are hearts with the classes RV, Myo, LV.* received left, right, back"
    ):
        PhantomMixing(0.5, class_names=["left", "right", "back"])


@pytest.mark.parametrize("is_within_a_teacher", [False, True])
def test_every_epoch_begins_with_its_own_phantoms_also_within_a_mean_teacher(is_within_a_teacher):
    slices = SliceDataset([{key: value.mT for key, value in batch_of(1).items()}], progress=False)
    batch = batch_of(4, dtype=torch.float32)
    mix, resumed = PhantomMixing(0.5, pool_size=64), PhantomMixing(0.5, pool_size=64)
    first = [phantoms_of(mix, batch)[0] for _ in range(3)]
    mixing = (
        PseudoLabelCutMix(ExponentialMovingAverage(torch.nn.Linear(1, 1)), resumed) if is_within_a_teacher else resumed
    )
    trainer = Engine(lambda *_: None)
    trainer.state.epoch = 2
    slices._items = [(0, 0)] * 8  # an epoch of two batches
    EpochSeeds(slices, seed=0, prepare_batch=mixing)(trainer)
    assert torch.equal(phantoms_of(mixing, batch)[0], first[2])


def test_a_trainer_that_mixes_no_phantoms_has_seeds_too():
    slices = SliceDataset([batch_of(1)], progress=False)
    seeds = EpochSeeds(slices, seed=0, prepare_batch=default_prepare_batch)
    trainer = Engine(lambda *_: None)
    trainer.state.epoch = 1
    seeds(trainer)
    drawn = torch.rand(2)
    seeds(trainer)
    assert torch.equal(torch.rand(2), drawn)
