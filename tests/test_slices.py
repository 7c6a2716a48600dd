import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.transforms import Compose, RandGaussianNoised, RepeatChanneld

from components.data.slices import SliceDataset
from components.data.transforms import RoundIntensityd
from components.training.epoch_handlers import EpochSeeds

RANDOM = np.random.default_rng(0)


def volume(depth: int) -> dict[str, np.ndarray]:
    image = RANDOM.integers(50, 200, size=(1, 6, 5, depth))
    return {"image": image, "label": image % 4}


FIRST, SECOND = volume(3), volume(2)


def augmentation() -> Compose:
    return Compose([RandGaussianNoised("image", prob=1.0, std=10), RoundIntensityd("image")])


def images(dataset: SliceDataset) -> list[torch.Tensor]:
    return [dataset[index]["image"] for index in range(len(dataset))]


def all_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_each_slice_of_each_volume_is_an_item():
    dataset = SliceDataset([FIRST, SECOND], progress=False)
    assert len(dataset) == 5
    expected = [*np.moveaxis(FIRST["image"], -1, 0), *np.moveaxis(SECOND["image"], -1, 0)]
    assert all_equal(images(dataset), [torch.from_numpy(array).float() for array in expected])
    assert torch.equal(dataset[4]["label"], torch.from_numpy(SECOND["label"][..., 1]).float())


def test_slice_transform_sees_a_fresh_copy_every_time():
    def blacken(item):
        item["image"].zero_()
        return item

    dataset = SliceDataset([FIRST], None, blacken, progress=False)
    assert dataset[0]["image"].sum() == 0
    dataset.slice_transform = None
    assert dataset[0]["image"].sum() > 0


def test_views_take_turns_from_epoch_to_epoch():
    dataset = SliceDataset([FIRST], None, augmentation(), views=3, progress=False)
    epochs = []
    for epoch in range(1, 8):
        dataset.set_epoch(epoch)
        epochs.append(images(dataset))
    for epoch in range(4):
        assert all_equal(epochs[epoch], epochs[epoch + 3])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not any(torch.equal(a, b) for a, b in zip(epochs[one], epochs[other], strict=True))


def test_views_are_the_same_in_another_run_and_beside_other_volumes():
    torch.manual_seed(0)
    np.random.seed(0)
    few = SliceDataset([SECOND], None, augmentation(), views=4, progress=False)
    expected = images(few)
    np.random.seed(1)
    many = SliceDataset([FIRST, SECOND], None, augmentation(), views=4, progress=False)
    images(many)  # other slices are augmented before
    assert all_equal(expected, images(many)[3:])


def test_two_slices_are_augmented_differently():
    flat = {"image": np.full((1, 6, 5, 2), 100), "label": np.zeros((1, 6, 5, 2))}
    flat["image"][0, 0, 0, 1] = 101
    first, second = images(SliceDataset([flat], None, augmentation(), views=1, progress=False))
    assert (first - second).abs()[0, 1:].mean() > 5


def test_view_is_augmented_once_and_its_final_transform_runs_every_time():
    calls = {"augmented": 0, "final": 0}

    def count(name):
        def transform(item):
            calls[name] += 1
            return item

        return transform

    dataset = SliceDataset([FIRST], None, count("augmented"), views=2, final_transform=count("final"), progress=False)
    for epoch in (1, 2, 3, 4, 5):
        dataset.set_epoch(epoch)
        images(dataset)
    assert calls == {"augmented": 6, "final": 15}


def test_changing_a_view_in_place_leaves_the_next_one_as_it_was():
    dataset = SliceDataset([FIRST], None, augmentation(), views=1, progress=False)
    expected = dataset[0]["image"].clone()
    dataset[0]["image"].zero_()
    assert torch.equal(dataset[0]["image"], expected)


def test_without_views_every_epoch_is_augmented_afresh_and_alike_in_every_run():
    one, other = (SliceDataset([FIRST], None, augmentation(), progress=False) for _ in range(2))
    first = images(one)
    one.set_epoch(2)
    second = images(one)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other.set_epoch(2)
    assert all_equal(images(other), second)


def test_order_of_an_epoch_depends_on_seed_and_number_alone():
    dataset = SliceDataset([FIRST, SECOND], progress=False)

    def orders(seed, epochs, start=0):
        seen = []
        trainer = Engine(lambda _engine, batch: seen.append(batch["image"]))
        EpochSeeds(dataset, seed).attach(trainer)
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda: torch.rand(7)
        )  # uses random numbers, as a validation may

        @trainer.on(Events.STARTED)
        def go_on(engine):
            engine.state.epoch, engine.state.iteration = start, start

        trainer.run(DataLoader(dataset, batch_size=5, shuffle=True), max_epochs=epochs)
        return seen

    unbroken = orders(3, epochs=3)
    assert all_equal(unbroken[2:], orders(3, epochs=3, start=2))
    assert not torch.equal(unbroken[0], unbroken[1])
    assert not all_equal(unbroken, orders(4, epochs=3))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_trainer_turns_the_views_also_in_worker_processes_and_after_resuming(num_workers):
    grey_to_rgb = RepeatChanneld("image", repeats=3)
    dataset = SliceDataset([FIRST], None, augmentation(), views=3, final_transform=grey_to_rgb, progress=False)
    loader = DataLoader(dataset, batch_size=3, num_workers=num_workers)
    seen = []
    trainer = Engine(lambda _engine, batch: seen.append(batch["image"]))
    EpochSeeds(dataset, seed=0).attach(trainer)
    trainer.run(loader, max_epochs=4)
    assert seen[0].shape == (3, 3, 6, 5)
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])

    resumed = Engine(lambda _engine, batch: seen.append(batch["image"]))
    EpochSeeds(dataset, seed=0).attach(resumed)

    @resumed.on(Events.STARTED)
    def go_on(engine):
        engine.state.epoch, engine.state.iteration = 2, 2

    resumed.run(loader, max_epochs=3)
    assert torch.equal(seen[4], seen[2])


def test_labelled_volume_without_a_label_is_named():
    bare = {"image": FIRST["image"]}
    with pytest.raises(
        ValueError, match=r"^a\.nii has no label: expected a labelled volume, or one without a label among"
    ):
        SliceDataset([FIRST | {"image": "a.nii"}], lambda _: bare, progress=False)
    SliceDataset([], unlabelled=[bare], progress=False)
    SliceDataset([bare], keys=["image"], progress=False)


@pytest.mark.parametrize("views", [-1, "16"])
def test_impossible_number_of_views_is_refused(views):
    with pytest.raises(ValueError, match="--views 16"):
        SliceDataset([FIRST], views=views, progress=False)


def test_few_labelled_slices_are_repeated_as_other_views_beside_many_unlabelled_ones():
    labelled, image = volume(2), torch.zeros(1, 6, 5, 8)
    dataset = SliceDataset(
        [labelled],
        None,
        augmentation(),
        unlabelled=[{"image": image}],
        progress=False,
    )
    assert len(dataset) == 2 * 2 + 8
    first, again = (dataset[index]["image"] for index in (0, 10))
    assert not torch.equal(first, again)
    assert (first - again).abs().max() < 100
    unaugmented = torch.from_numpy(labelled["image"][..., 0]).float()
    assert all((shown - unaugmented).abs().mean() < 20 for shown in (first, again))


def test_slices_of_three_planes_show_every_voxel_three_times():
    image = np.arange(1, 1 + 6 * 5 * 3).reshape(1, 6, 5, 3)
    dataset = SliceDataset([{"image": image, "label": image % 4}], planes=3, progress=False)
    assert len(dataset) == 3 + 5 + 6
    shown = images(dataset)
    assert {tuple(each.shape) for each in shown} == {(1, 6, 5)}
    assert torch.equal(shown[3][0, :, 1:4], torch.from_numpy(image[0, :, 0]).float())  # across the width, padded
    assert torch.equal(shown[3 + 5][0, 1:4], torch.from_numpy(image[0, 0].T).float())  # across the height
    values, counts = torch.cat([each.flatten() for each in shown]).unique(return_counts=True)
    assert values[values > 0].tolist() == list(range(1, 91))
    assert set(counts[values > 0].tolist()) == {3}


def test_slices_deeper_than_wide_are_not_cut_in_the_other_planes():
    image = np.ones((1, 4, 4, 9), np.uint8)
    dataset = SliceDataset([{"image": image, "label": image}], planes=3, progress=False)
    assert {tuple(each.shape) for each in images(dataset)} == {(1, 4, 4), (1, 4, 9), (1, 9, 4)}


def test_neighbours_lie_across_the_plane_that_is_seen():
    image = np.arange(4 * 4 * 4).reshape(1, 4, 4, 4)
    dataset = SliceDataset([{"image": image, "label": image % 4}], planes=3, neighbours=True, progress=False)
    across_height = dataset[4 + 4 + 1]["image"]
    assert torch.equal(across_height, torch.from_numpy(image[0, :3].transpose(0, 2, 1).copy()).float())
    assert dataset[4 + 4 + 1]["label"].shape == (1, 4, 4)


def test_other_numbers_of_planes_are_refused():
    with pytest.raises(ValueError, match=r"expected 1 or 3 planes.* received 2: give for example --planes 1"):
        SliceDataset([FIRST], planes=2, progress=False)


def test_slices_without_a_class_are_at_most_their_share():
    label = np.zeros([1, 6, 5, 9], dtype=int)
    label[..., :2] = 1
    stack = {"image": RANDOM.integers(50, 200, size=label.shape), "label": label}
    dataset = SliceDataset([stack], None, augmentation(), background_share=0.25, progress=False)
    shown = [bool(item["label"].any()) for item in dataset]
    assert len(shown) == 7 + 2 * 11 and shown.count(False) == 7 <= 0.25 * len(shown)
    assert len({item["image"].sum().item() for item in dataset}) == len(shown)  # each time as another view
    without = SliceDataset([stack | {"label": 0 * label}], background_share=0.25, progress=False)
    assert len(without) == len(SliceDataset([stack], progress=False)) == 9
    with pytest.raises(ValueError, match="background_share must be above 0"):
        SliceDataset([stack], background_share=0, progress=False)
