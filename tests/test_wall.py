"""Wall thickness by segment, on hearts whose thickness is known."""

import numpy as np
import pytest

from components.function.wall import SEGMENTS, thickening_percent, wall_thickness_mm

CLASSES = {"RV": 1, "Myo": 2, "LV": 3}
SPACING = 1.5
# slices as a radiologist sees them: rows run to the left, columns to the feet, slices from base to apex
AFFINE = np.array([[-SPACING, 0, 0, 0], [0, 0, 10, 0], [0, -SPACING, 0, 0], [0, 0, 0, 1]])


def heart(slices=9, septal_mm=8.0, lateral_mm=8.0, inferior_extra_mm=0.0):
    """A cavity that narrows to the apex, a ring around it, and the right ventricle on the patient's right."""
    x, y = np.meshgrid(*[(np.arange(96) - 47.5) * SPACING] * 2, indexing="ij")  # x to the left, y to the feet
    labels = np.zeros((96, 96, slices), np.uint8)
    angle = np.arctan2(y, -x)  # 0 towards the right ventricle, positive towards the feet
    wall = (septal_mm + lateral_mm) / 2 + (septal_mm - lateral_mm) / 2 * np.cos(angle)
    wall = wall + inferior_extra_mm * (np.abs(angle - np.pi / 2) < np.pi / 6)
    for n in range(slices):
        endo, radius = 24 - 1.2 * n, np.hypot(x, y)
        labels[..., n][(np.hypot(x + endo + 12, y * 0.8) < 22 - n) & (radius > endo)] = 1
        labels[..., n][radius < endo + wall] = 2
        labels[..., n][radius < endo] = 3
    return labels


def by_name(labels, affine=AFFINE):
    return dict(zip(SEGMENTS, wall_thickness_mm(labels, affine, CLASSES), strict=True))


def test_an_even_wall_is_as_thick_in_all_segments():
    assert len(SEGMENTS) == 16
    assert list(by_name(heart()).values()) == pytest.approx([8] * 16, abs=0.3)


def test_a_thick_septum_and_a_thick_inferior_wall_are_found_where_they_are():
    septal = by_name(heart(septal_mm=12, lateral_mm=6))
    for level in ("basal", "mid"):
        assert septal[f"{level} anteroseptal"] == pytest.approx(septal[f"{level} inferoseptal"], abs=0.3)
        assert septal[f"{level} anteroseptal"] > 11
        assert septal[f"{level} anterolateral"] < 7
        assert septal[f"{level} anterior"] == pytest.approx(septal[f"{level} inferior"], abs=0.3)
    assert septal["apical septal"] > septal["apical anterior"] > septal["apical lateral"]
    inferior = by_name(heart(inferior_extra_mm=5))
    assert inferior["mid inferior"] == pytest.approx(13, abs=0.5)
    assert inferior["mid anterior"] == pytest.approx(8, abs=0.3)
    assert inferior["apical inferior"] > inferior["apical anterior"] + 2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_order_in_which_voxels_are_stored_does_not_matter(axis):
    labels = heart(septal_mm=10, inferior_extra_mm=4)
    flip = np.eye(4)
    flip[axis, axis], flip[axis, 3] = -1, labels.shape[axis] - 1
    assert by_name(np.flip(labels, axis), AFFINE @ flip) == pytest.approx(by_name(labels), abs=1e-6)


def test_slices_whose_file_calls_them_axial_have_the_anterior_wall_on_top():
    labels = heart(septal_mm=10, inferior_extra_mm=4)
    axial = np.diag([-SPACING, -SPACING, 10, 1])  # as ACDC's files have it: axis 1 runs to the back
    assert by_name(labels, axial) == pytest.approx(by_name(labels))


def test_what_is_not_seen_is_not_measured():
    labels = heart(slices=2)
    assert np.isnan(wall_thickness_mm(labels, AFFINE, CLASSES)).tolist() == [False] * 12 + [True] * 4
    without_right = np.where(labels == 1, 0, labels)
    assert np.isnan(wall_thickness_mm(without_right, AFFINE, CLASSES)).all()
    assert np.isnan(wall_thickness_mm(np.zeros_like(labels), AFFINE, CLASSES)).all()


def test_an_open_ring_is_measured_where_it_is_closed():
    labels = heart()
    labels[:, 48:][labels[:, 48:] == 2] = 0  # open towards the feet
    found = by_name(labels)
    assert found["mid anterior"] == pytest.approx(8, abs=0.3)
    assert np.isnan(found["mid inferior"])


def test_a_wall_that_doubles_thickens_by_all_of_it():
    assert thickening_percent(np.array([8, np.nan]), np.array([16, 10])) == pytest.approx([100, np.nan], nan_ok=True)
