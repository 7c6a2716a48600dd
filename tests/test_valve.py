import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from components.inference.valve import EndAtValved

CLASSES = ("RV", "Myo", "LV")
SIZE, RV = 64, 1
DOWN, RIGHT = np.mgrid[:SIZE, :SIZE]
SURE = 0.97


def disc(row: float, column: float, radius: float) -> np.ndarray:
    return np.hypot(DOWN - row, RIGHT - column) <= radius


LEFT = {2: disc(32, 42, 14), 3: disc(32, 42, 9)}  # LV in its wall
VENTRICLE = disc(32, 22, 16)  # a crescent, after the LV is drawn over it
NOTHING = np.zeros((SIZE, SIZE), bool)
POOLS = disc(20, 22, 8) | disc(46, 22, 8)  # outflow tract and atrium


def probabilities(*right: np.ndarray, sure: tuple[float, ...] | None = None) -> torch.Tensor:
    """Return probabilities 4xHxWxD of slices from base to apex, each with the given mask of the RV and the LV."""
    slices = []
    for mask, of_rv in zip(right, sure or [SURE] * len(right), strict=True):
        labels = np.where(mask, RV, 0)
        for label, where in LEFT.items():
            labels[where] = label
        best = np.where(labels == RV, of_rv, SURE)
        shown = np.eye(4)[labels].transpose(2, 0, 1)
        slices.append(shown * best + (1 - shown) * (1 - best) / 3)
    return torch.from_numpy(np.stack(slices, axis=-1)).float()


def ended(outputs: torch.Tensor, *, slice_mm: float = 10.0, score: float = 0.8, is_probability: bool = True):
    affine = torch.diag(torch.tensor([1.5, 1.5, slice_mm, 1.0]))
    image = MetaTensor(torch.zeros(1, *outputs.shape[1:]), affine=affine)
    transform = EndAtValved("pred", class_names=CLASSES, minimum_score=score, is_probability=is_probability)
    return transform({"image": image, "pred": outputs})["pred"]


def slices_with_rv(outputs: torch.Tensor) -> list[int]:
    return np.flatnonzero((outputs.argmax(0) == RV).any(0).any(0)).tolist()


def test_pools_at_the_base_are_cleared_and_ventricles_stay_bit_for_bit():
    before = probabilities(POOLS, VENTRICLE, VENTRICLE, disc(32, 24, 8))
    after = ended(before)
    assert slices_with_rv(after) == [1, 2, 3]
    assert torch.equal(after[..., 1:], before[..., 1:])
    assert (after.argmax(0)[..., 0][torch.from_numpy(POOLS & ~LEFT[2])] == 0).all()
    assert torch.equal(after[2:], before[2:])
    assert torch.allclose(after.sum(0), torch.ones(SIZE, SIZE, 4))


def test_a_convex_pool_of_which_the_network_is_unsure_is_cleared_too():
    before = probabilities(VENTRICLE, VENTRICLE, VENTRICLE, disc(32, 22, 10), sure=(0.8, SURE, 0.8, SURE))
    assert slices_with_rv(ended(before, slice_mm=5.0)) == [1, 2, 3]  # beyond a ventricle's slice none is judged
    assert slices_with_rv(ended(before, score=0.75)) == [0, 1, 2, 3]


def test_the_base_is_the_end_with_more_of_the_ventricle():
    before = probabilities(disc(32, 24, 6), disc(32, 22, 10), VENTRICLE, POOLS)
    assert slices_with_rv(ended(before)) == [0, 1, 2]


@pytest.mark.parametrize(("slice_mm", "cleared"), [(30.0, 1), (10.0, 1), (7.0, 2), (5.0, 3)])
def test_no_more_is_cleared_than_the_valve_descends(slice_mm, cleared):
    narrowing = [disc(32, 22, radius) for radius in (16, 14, 12, 10, 8, 6)]
    before = probabilities(*[POOLS] * 4, *narrowing)
    assert slices_with_rv(ended(before, slice_mm=slice_mm)) == [*range(cleared, 10)]


def test_logits_are_judged_by_their_probabilities():
    before = probabilities(VENTRICLE, VENTRICLE, disc(32, 22, 4), sure=(0.8, SURE, SURE))
    by_logits = ended(before.log() + 3, is_probability=False)
    assert slices_with_rv(by_logits) == [1, 2]
    assert torch.allclose(by_logits.softmax(0), ended(before), atol=1e-6)


@pytest.mark.parametrize("right", [NOTHING, POOLS], ids=["none", "one slice"])
def test_volumes_with_the_right_ventricle_in_one_slice_or_none_stay(right):
    before = probabilities(right, NOTHING)
    assert torch.equal(ended(before), before)


def test_single_pixels_are_judged_without_an_error():
    lone = disc(5, 5, 0)
    assert slices_with_rv(ended(probabilities(lone, VENTRICLE, VENTRICLE))) == [0, 1, 2]


def test_models_without_the_classes_are_refused():
    with pytest.raises(ValueError, match=r"without LV received RV, Myo: .* minimum_rv_score to 0"):
        EndAtValved("pred", class_names=["RV", "Myo"], minimum_score=0.9, is_probability=True)
    with pytest.raises(ValueError, match="minimum_rv_score from 0 to 1, received 9"):
        EndAtValved("pred", class_names=CLASSES, minimum_score=9, is_probability=True)


def test_an_image_without_the_distance_of_slices_is_refused():
    transform = EndAtValved("pred", class_names=CLASSES, minimum_score=0.9, is_probability=True)
    with pytest.raises(ValueError, match="expected a MetaTensor with an affine, received a Tensor; load the image by"):
        transform({"image": torch.zeros(1, SIZE, SIZE, 2), "pred": probabilities(POOLS, VENTRICLE)})
