import numpy as np
import pytest
import torch
from monai.transforms import GaussianSmooth

from components.inference.valve import EndAtValved

CLASSES = ("RV", "Myo", "LV")
SIZE, RV = 64, 1
DOWN, RIGHT = np.mgrid[:SIZE, :SIZE]
SURE = 0.97


def disc(row: float, column: float, radius: float) -> np.ndarray:
    return np.hypot(DOWN - row, RIGHT - column) <= radius


LEFT = {2: disc(32, 42, 14), 3: disc(32, 42, 9)}  # LV in its wall
NARROWING = [disc(32, 22, radius) for radius in (16, 15, 14, 12, 10, 8, 6, 4)]  # a crescent beside the LV
UNSURE = 0.8


def probabilities(*sure: float | None, radii: int = 0) -> torch.Tensor:
    """Return probabilities 4xHxWxD of slices from base to apex, with the given one of the RV; None has no RV.

    Args:
        sure: of each slice.
        radii: slices that have the same RV as the first one.
    """
    slices = []
    for number, of_rv in enumerate(sure):
        labels = np.where(NARROWING[max(0, number - radii)], RV, 0) if of_rv else np.zeros((SIZE, SIZE), int)
        for label, where in LEFT.items():
            labels[where] = label
        best = np.where(labels == RV, of_rv or SURE, SURE)
        shown = np.eye(4)[labels].transpose(2, 0, 1)
        slices.append(shown * best + (1 - shown) * (1 - best) / 3)
    return torch.from_numpy(np.stack(slices, axis=-1)).float()


def ended(outputs: torch.Tensor, *, minimum: float = 0.93, is_probability: bool = True):
    transform = EndAtValved("pred", class_names=CLASSES, minimum_probability=minimum, is_probability=is_probability)
    items = transform({"pred": outputs, "unsmoothed": outputs})
    assert items.keys() == {"pred"}
    return items["pred"]


def slices_with_rv(outputs: torch.Tensor) -> list[int]:
    return np.flatnonzero((outputs.argmax(0) == RV).any(0).any(0)).tolist()


def test_an_unsure_slice_at_the_base_is_cleared_and_all_else_stays_bit_for_bit():
    before = probabilities(UNSURE, SURE, SURE, SURE)
    after = ended(before)
    assert slices_with_rv(after) == [1, 2, 3]
    assert torch.equal(after[..., 1:], before[..., 1:])
    assert torch.equal(after[2:], before[2:])
    was_rv = before[..., 0].argmax(0) == RV
    assert torch.equal(after[0, ..., 0][was_rv], before[RV, ..., 0][was_rv])
    assert torch.allclose(after.sum(0), torch.ones(SIZE, SIZE, 4))
    assert slices_with_rv(ended(before, minimum=0.75)) == [0, 1, 2, 3]


def test_the_first_sure_slice_ends_the_search():
    rest = [SURE] * 13
    assert slices_with_rv(ended(probabilities(UNSURE, SURE, UNSURE, *rest, radii=8))) == [*range(1, 16)]
    assert slices_with_rv(ended(probabilities(SURE, UNSURE, UNSURE, *rest, radii=8))) == [*range(16)]


def test_the_base_is_the_end_towards_which_the_ventricle_widens():
    upside_down = probabilities(UNSURE, SURE, SURE, UNSURE).flip(-1)
    assert slices_with_rv(ended(upside_down)) == [0, 1, 2]


@pytest.mark.parametrize(("slices", "cleared"), [(4, 1), (9, 1), (10, 2), (14, 2), (15, 3)])
def test_no_more_is_cleared_than_the_valve_descends(slices, cleared):
    before = probabilities(*[UNSURE] * 4, *[SURE] * (slices - 4), radii=max(0, slices - 8))
    assert slices_with_rv(ended(before)) == [*range(cleared, slices)]


def test_logits_are_judged_like_probabilities():
    before = probabilities(UNSURE, SURE, SURE)
    by_logits = ended(before.log() + 3, is_probability=False)
    assert slices_with_rv(by_logits) == [1, 2]
    assert torch.allclose(by_logits.softmax(0), ended(before), atol=1e-6)


def test_what_smoothing_makes_unsure_stays():
    before = probabilities(None, SURE, SURE, SURE)
    transform = EndAtValved("pred", class_names=CLASSES, minimum_probability=0.93, is_probability=True)
    smoothed = GaussianSmooth((0, 0, 0.6))(before)
    assert torch.equal(transform({"pred": smoothed, "unsmoothed": before})["pred"], smoothed)


@pytest.mark.parametrize("sure", [None, UNSURE], ids=["none", "one slice"])
def test_volumes_with_the_right_ventricle_in_one_slice_or_none_stay(sure):
    before = probabilities(None, sure, None)
    assert torch.equal(ended(before), before)


def test_models_without_a_right_ventricle_are_refused():
    with pytest.raises(ValueError, match=r"expected the class RV, received Myo, LV: .* minimum_rv_probability to 0"):
        EndAtValved("pred", class_names=["Myo", "LV"], minimum_probability=0.9, is_probability=True)
    with pytest.raises(ValueError, match="minimum_rv_probability from 0 to 1, received 9"):
        EndAtValved("pred", class_names=CLASSES, minimum_probability=9, is_probability=True)
