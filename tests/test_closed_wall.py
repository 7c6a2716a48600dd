import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from components.inference.closed_wall import CloseWalld

CLASSES = ("RV", "Myo", "LV")
MM = 1.5
SIZE, CENTRE, RADIUS = 64, 32, 10


def outputs(*, wall_px: int, gap_to: int | None = None, second: int = 2) -> torch.Tensor:
    """Return logits 4xHxWx2 of a round cavity with a wall, open from column `gap_to` on, with a second best class."""
    down, right = np.mgrid[:SIZE, :SIZE] - CENTRE
    distance = np.hypot(down, right)
    labels = np.where(distance <= RADIUS, 3, np.where(distance <= RADIUS + wall_px, 2, 0))
    if gap_to is not None:
        labels[(labels == 2) & (right > gap_to)] = 0
    logits = np.eye(4)[labels].transpose(2, 0, 1) * 4
    logits[second] += 1
    return torch.from_numpy(np.stack([logits, logits], axis=-1)).float()


def closed(prediction: torch.Tensor, minimum_mm: float = 6.0, pixel_mm: float = MM) -> torch.Tensor:
    image = MetaTensor(torch.zeros(1, SIZE, SIZE, 2), affine=torch.diag(torch.tensor([pixel_mm, pixel_mm, 10.0, 1.0])))
    transform = CloseWalld("pred", class_names=CLASSES, minimum_mm=minimum_mm)
    return transform({"image": image, "pred": prediction})["pred"]


def thickness_to_the_right(prediction: torch.Tensor) -> int:
    return int((prediction.argmax(0)[CENTRE, CENTRE:, 0] == 2).sum())


def test_gap_is_closed_up_to_the_minimum_in_mm():
    gap = outputs(wall_px=7, gap_to=0)
    assert thickness_to_the_right(gap) == 0
    assert thickness_to_the_right(closed(gap)) == 4  # 6 mm
    assert thickness_to_the_right(closed(gap, pixel_mm=3.0)) == 2
    assert thickness_to_the_right(closed(gap, minimum_mm=3.0)) == 2


def test_thick_walls_stay_bit_for_bit():
    whole = outputs(wall_px=7)
    assert torch.equal(closed(whole), whole)


def test_gap_stays_where_another_class_is_the_second_best():
    gap = outputs(wall_px=7, gap_to=0, second=1)
    assert torch.equal(closed(gap), gap)


def test_right_ventricle_beside_the_cavity_stays():
    beside = outputs(wall_px=7, gap_to=0)
    free = beside.argmax(0) == 0
    beside[1][free] = 9.0
    assert torch.equal(closed(beside), beside)


def test_probabilities_are_closed_like_logits_and_keep_their_sum():
    gap = outputs(wall_px=7, gap_to=0)
    probabilities = closed(gap.softmax(0))
    assert torch.equal(probabilities.argmax(0), closed(gap).argmax(0))
    assert torch.allclose(probabilities.sum(0), torch.ones(SIZE, SIZE, 2))


def test_slices_without_a_cavity_stay():
    half = outputs(wall_px=7, gap_to=0)
    half[..., 1] = 0
    half[0, ..., 1] = 5.0
    assert torch.equal(closed(half)[..., 1], half[..., 1])


def test_models_without_the_classes_are_refused():
    with pytest.raises(ValueError, match=r"without LV received RV, Myo: .* minimum_wall_mm to 0"):
        CloseWalld("pred", class_names=["RV", "Myo"], minimum_mm=6)
    with pytest.raises(ValueError, match="minimum_wall_mm of 0 or more, received -1"):
        CloseWalld("pred", class_names=CLASSES, minimum_mm=-1)


def test_an_image_without_the_size_of_a_pixel_is_refused():
    transform = CloseWalld("pred", class_names=CLASSES, minimum_mm=6.0)
    with pytest.raises(ValueError, match="expected a MetaTensor with an affine, received a Tensor; load the image by"):
        transform({"image": torch.zeros(1, SIZE, SIZE, 2), "pred": outputs(wall_px=7)})
