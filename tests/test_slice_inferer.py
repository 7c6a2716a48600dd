"""Averaging over turned and mirrored views: toy networks whose means are derived by hand."""

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SliceInferer

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


@pytest.mark.parametrize(("views", "turns"), [(2, 2), (4, 1), (8, 3)])
def test_turned_volume_gives_the_turned_prediction(views, turns):
    inferer = TestTimeAugmentationInferer(**SETTINGS, test_time_views=views)
    torch.testing.assert_close(inferer(turned(VOLUME, turns), uneven), turned(inferer(VOLUME, uneven), turns))
    if views == 8:
        torch.testing.assert_close(inferer(VOLUME.flip(2), uneven), inferer(VOLUME, uneven).flip(2))


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
