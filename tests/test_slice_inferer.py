"""Averaging over turned and mirrored views: toy networks whose means are derived by hand."""

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SliceInferer

from components.inference import slice_inferer
from components.inference.slice_inferer import TestTimeAugmentationInferer

SETTINGS = {"roi_size": (4, 4), "sw_batch_size": 2, "spatial_dim": 2}
VOLUME = torch.arange(4 * 4 * 3).view(1, 1, 4, 4, 3).float()

# Where the pixel (0, 1) of each view of a 4x4 slice lies in the slice, by number of views.
SEEN = {
    2: [(0, 1), (3, 2)],
    4: [(0, 1), (1, 3), (2, 0), (3, 2)],
    8: [(0, 1), (0, 2), (1, 0), (1, 3), (2, 0), (2, 3), (3, 1), (3, 2)],
}


def sure_of_one_pixel(slices):
    """Predict class 1 at (0, 1) and class 0 elsewhere, whatever the input."""
    logits = torch.zeros(len(slices), 2, *slices.shape[2:])
    logits[:, 0] = 1000
    logits[:, 1, 0, 1] = 2000
    return logits


def pixelwise(slices):
    """A network that treats each pixel independently, so that it is equivariant to turns."""
    return torch.cat([slices, -slices, slices / 7], dim=1) / 10


def uneven(slices):
    """A network whose output depends on where a pixel is."""
    ramp = torch.arange(16).view(4, 4) / 16
    return torch.cat([slices * ramp, slices * ramp.T, slices], dim=1) / 10


def turned(volume, turns):
    return volume.rot90(turns, (2, 3))


@pytest.mark.parametrize("views", [2, 4, 8])
def test_each_view_is_turned_back_and_counts_alike(views):
    means = TestTimeAugmentationInferer(**SETTINGS, test_time_views=views)(VOLUME, sure_of_one_pixel)
    expected = torch.zeros(4, 4)
    for row, column in SEEN[views]:
        expected[row, column] = 1 / views
    for index in range(3):
        assert torch.equal(means[0, 1, ..., index], expected)
        assert torch.equal(means[0, 0, ..., index], 1 - expected)


def test_one_view_is_monais_slice_inferer():
    logits = TestTimeAugmentationInferer(**SETTINGS, test_time_views=1)(VOLUME, uneven)
    assert torch.equal(logits, SliceInferer(**SETTINGS)(VOLUME, uneven))
    assert torch.equal(TestTimeAugmentationInferer(**SETTINGS)(VOLUME, uneven), logits)


@pytest.mark.parametrize("views", [2, 4, 8])
def test_views_that_all_agree_give_the_networks_own_probabilities(views):
    inferer = TestTimeAugmentationInferer(**SETTINGS, test_time_views=views)
    expected = SliceInferer(**SETTINGS)(VOLUME, pixelwise).softmax(dim=1)
    torch.testing.assert_close(inferer(VOLUME, pixelwise), expected)


@pytest.mark.parametrize(("views", "turns"), [(2, 2), (4, 1), (8, 2)])
def test_turned_volume_gives_the_turned_prediction(views, turns):
    inferer = TestTimeAugmentationInferer(**SETTINGS, test_time_views=views)
    torch.testing.assert_close(inferer(turned(VOLUME, turns), uneven), turned(inferer(VOLUME, uneven), turns))


def test_turned_or_mirrored_volume_gives_that_prediction_where_all_views_are_run(monkeypatch):
    monkeypatch.setattr(slice_inferer, "_UNSURE_ABOVE", -1)
    inferer = TestTimeAugmentationInferer(**SETTINGS, test_time_views=8)
    torch.testing.assert_close(inferer(turned(VOLUME, 3), uneven), turned(inferer(VOLUME, uneven), 3))
    torch.testing.assert_close(inferer(VOLUME.flip(2), uneven), inferer(VOLUME, uneven).flip(2))


class Marked:
    """Predict each pixel's own class, but where a view holds a 5, class 1 at (0, 1). Counts the views of all slices."""

    def __init__(self):
        self.seen = 0

    def __call__(self, slices):
        self.seen += len(slices)
        classes = torch.where(slices == 5, 0, slices)[:, 0].long()
        classes[(slices == 5).flatten(1).any(dim=1), 0, 1] = 1
        return 1000 * torch.nn.functional.one_hot(classes, 3).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_of_eight_views_a_slice_whose_first_two_agree_gets_no_others_whatever_its_batch(batch_size):
    volume = torch.zeros(1, 1, 4, 4, 4)
    volume[..., 1:3, 1:3, 1] = 1  # slice 0 shows nothing, and in slice 1 all views agree
    volume[..., 2, 2, 2] = volume[..., 1, 2, 3] = 5
    network = Marked()
    inferer = TestTimeAugmentationInferer(**SETTINGS | {"sw_batch_size": batch_size}, test_time_views=8)
    means = inferer(volume, network)
    assert network.seen == 2 * 2 + 2 * 8
    for index in (0, 1):
        assert torch.equal(means[..., index], Marked()(volume[..., index]).softmax(dim=1))
    for index in (2, 3):
        expected = torch.zeros(4, 4)
        for row, column in SEEN[8]:
            expected[row, column] = 1 / 8
        assert torch.equal(means[0, 1, ..., index], expected)
    assert torch.equal(inferer(volume.flip(4), Marked()), means.flip(4))


@pytest.mark.parametrize(("agreed", "views"), [(10, 8), (12, 2)])
def test_other_views_follow_if_the_first_two_differ_on_more_than_15_percent_of_the_foreground(agreed, views):
    volume = torch.zeros(1, 1, 8, 8, 1)
    volume[..., 3, : agreed // 2, 0] = volume[..., 4, 8 - agreed // 2 :, 0] = 1  # equal after a half turn
    volume[..., 6, 3, 0] = 5  # so that (0, 1) and (7, 6) differ: 2 of 12 or of 14 pixels
    network = Marked()
    TestTimeAugmentationInferer(roi_size=(8, 8), sw_batch_size=2, spatial_dim=2, test_time_views=8)(volume, network)
    assert network.seen == views


def test_first_two_views_differ_too_where_both_see_foreground_of_two_classes():
    volume = torch.zeros(1, 1, 4, 4, 1)
    volume[..., 0, 0], volume[..., 3, 0] = 1, 2

    def from_above(slices):
        network.seen += len(slices)
        rows = torch.tensor([1, 0, 0, 2]).view(4, 1).expand(len(slices), 4, 4)
        return torch.nn.functional.one_hot(rows, 3).permute(0, 3, 1, 2).float()

    network = Marked()
    TestTimeAugmentationInferer(**SETTINGS, test_time_views=8)(volume, from_above)
    assert network.seen == 8


@pytest.mark.parametrize(("planes", "views"), [(1, 8), (3, 8), (3, 4)])
def test_each_window_of_each_plane_is_decided_alone_and_four_views_are_always_run(planes, views):
    volume = torch.zeros(1, 1, 8, 8, 8)
    volume[..., 5:, 5:, 0] = 5
    counted = []

    def marked_at_once(slices):
        """Differ between views only in the window with a full corner, which one plane alone shows."""
        counted.extend(slices)
        full = (slices == 5).flatten(1).sum(dim=1) == 9
        logits = torch.zeros(len(slices), 2, 4, 4)
        logits[:, 1, 0, 1] = torch.where(full, 1.0, -1.0)
        return logits

    settings = {"roi_size": (4, 4), "sw_batch_size": 3, "spatial_dim": 2, "overlap": 0}
    TestTimeAugmentationInferer(**settings, planes=planes, test_time_views=views)(volume, marked_at_once)
    windows = planes * 8 * 4
    assert len(counted) == (2 * windows + 6 if views == 8 else 4 * windows)


@pytest.mark.parametrize("views", [0, 3, 16, "8"])
def test_other_number_of_views_is_refused(views):
    with pytest.raises(ValueError, match=r"expected 1, 2, 4, 8 test-time views.*--test_time_views 8"):
        TestTimeAugmentationInferer(**SETTINGS, test_time_views=views)


def test_condition_beside_several_views_is_refused():
    inferer = TestTimeAugmentationInferer(**SETTINGS, test_time_views=2)
    with pytest.raises(ValueError, match="give --test_time_views 1"):
        inferer(VOLUME, lambda slices, _condition: slices, condition=VOLUME)


def test_output_that_is_not_finite_is_refused_with_the_volumes_file():
    volume = MetaTensor(torch.zeros(1, 3, 8, 8, 2), meta={"filename_or_obj": ["/data/x.nii.gz"]})
    inferer = TestTimeAugmentationInferer(roi_size=[8, 8], sw_batch_size=2, spatial_dim=2)
    with pytest.raises(
        ValueError, match=r"/data/x\.nii\.gz has no segmentation: expected finite values.*received 256 NaN"
    ):
        inferer(volume, lambda slices: slices[:, :2] / 0)


def test_three_planes_are_averaged_each_turned_back():
    volume = torch.rand(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    three = TestTimeAugmentationInferer(**SETTINGS, planes=3)(volume, uneven)
    expected = torch.zeros_like(three)
    for index in range(4):
        expected[..., index] += uneven(volume[..., index]).softmax(dim=1) / 3
        expected[:, :, :, index] += uneven(volume[:, :, :, index]).softmax(dim=1) / 3
        expected[:, :, index] += uneven(volume[:, :, index].mT).softmax(dim=1).mT / 3
    assert torch.allclose(three, expected, atol=1e-6)


@pytest.mark.parametrize("depth", [2, 11])
def test_planes_deeper_or_shallower_than_the_window_come_back_whole(depth):
    volume = torch.rand(1, 1, 4, 4, depth, generator=torch.Generator().manual_seed(0))
    one, three = (TestTimeAugmentationInferer(**SETTINGS, planes=planes)(volume, pixelwise) for planes in (1, 3))
    assert three.shape == (1, 3, 4, 4, depth)
    assert torch.allclose(three, one.softmax(dim=1), atol=1e-6)  # pixel by pixel, planes make no difference


def test_neighbours_are_those_across_each_plane():
    def before_and_after(slices):
        return torch.stack([slices[:, 0], slices[:, 2]], dim=1)

    inferer = TestTimeAugmentationInferer(**SETTINGS, neighbours=True)
    outputs = inferer(torch.arange(7.0).expand(1, 1, 4, 4, 7), before_and_after)[0, :, 2, 3]
    assert outputs[0].tolist() == [0, *range(6)]
    assert outputs[1].tolist() == [*range(1, 7), 6]
