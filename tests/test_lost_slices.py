import numpy as np
import pytest
import torch

from components.inference.lost_slices import FillLostSlicesd

CLASSES = ("RV", "Myo", "LV")
RV, MYO, LV = 1, 2, 3
SIZE = 48
DOWN, RIGHT = np.mgrid[:SIZE, :SIZE]


def heart(radius: float, column: int = 24) -> np.ndarray:
    """Return labels HxW of a round cavity in a wall of 3 pixels; radius 0 has none."""
    distance = np.hypot(DOWN - 24, RIGHT - column)
    labels = np.where(distance <= radius + 3, MYO, 0)
    return np.where(distance <= radius, LV, labels) if radius else np.zeros_like(labels)


def probabilities(*slices: np.ndarray) -> torch.Tensor:
    """Return probabilities 4xHxWxD, 0.91 for the given labels."""
    labels = np.stack(slices, axis=-1)
    return torch.from_numpy(0.88 * np.eye(4)[labels].transpose(3, 0, 1, 2) + 0.03).float()


def filled(outputs: torch.Tensor, minimum_share: float = 0.25) -> torch.Tensor:
    return FillLostSlicesd("pred", class_names=CLASSES, minimum_share=minimum_share)({"pred": outputs})["pred"]


def areas(outputs: torch.Tensor, label: int = LV) -> list[int]:
    return (outputs.argmax(0) == label).sum((0, 1)).tolist()


def test_lost_slices_lie_between_those_on_both_sides():
    before = probabilities(heart(14), heart(0), heart(0), heart(8))
    after = filled(before)
    cavity = areas(after)
    assert cavity[0] >= cavity[1] >= cavity[2] >= cavity[3] > 0
    assert min(areas(after, MYO)) > 0
    assert torch.equal(after[..., [0, 3]], before[..., [0, 3]])
    assert torch.allclose(after[..., 1], before[..., 0] * 2 / 3 + before[..., 3] / 3)
    assert torch.allclose(after.sum(0), torch.ones(SIZE, SIZE, 4))


def test_logits_are_filled_in_the_same_pixels():
    before = probabilities(heart(14), heart(0), heart(14))
    assert torch.equal(filled(before.log() + 3).argmax(0), filled(before).argmax(0))


def test_what_the_network_saw_in_a_lost_slice_stays():
    seen = np.where(np.hypot(DOWN - 24, RIGHT - 24) <= 3, RV, heart(0))
    before = probabilities(heart(14), seen, heart(14))
    after = filled(before)
    is_seen = torch.from_numpy(seen == RV)
    assert torch.equal(after[..., 1][:, is_seen], before[..., 1][:, is_seen])
    assert areas(after)[1] == areas(after)[0] - int(is_seen.sum())


@pytest.mark.parametrize(
    "radii",
    [(0, 0, 14, 14), (14, 14, 0, 0), (14, 12, 8, 4), (4, 12, 14, 10), (14, 8, 14, 14), (0, 0, 0, 0)],
    ids=["base", "apex", "narrowing", "apex first", "a third", "no heart"],
)
def test_hearts_without_a_gap_stay_bit_for_bit(radii):
    before = probabilities(*map(heart, radii))
    assert torch.equal(filled(before), before)


def test_the_share_says_which_slices_are_lost():
    before = probabilities(heart(14), heart(8), heart(14))  # a third of the area
    assert torch.equal(filled(before, 0.25), before)
    assert areas(filled(before, 0.5))[1] > 2 * areas(before)[1]


def test_another_ring_far_away_is_not_joined():
    before = probabilities(heart(8, column=12), heart(0), heart(8, column=36))
    assert torch.equal(filled(before), before)


def test_models_without_the_class_are_refused():
    with pytest.raises(ValueError, match=r"expected the class LV, received RV, Myo: .* minimum_lv_share to 0"):
        FillLostSlicesd("pred", class_names=["RV", "Myo"], minimum_share=0.25)
    with pytest.raises(ValueError, match="minimum_lv_share from 0 to 1, received 2"):
        FillLostSlicesd("pred", class_names=CLASSES, minimum_share=2)
