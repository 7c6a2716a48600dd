import pytest
import torch
from conftest import seeded

from components.phantom.anatomy import AnatomyRanges, anatomy, draw_anatomy
from components.phantom.appearance import AppearanceRanges, draw_appearance, signal
from components.phantom.slices import phantom_slices
from components.phantom.tissues import Tissue

RV, MYO, LV = 1, 2, 3
SMALL = {"size_hw": (128, 112), "spacing_mm": 3.0}

pytestmark = pytest.mark.usefixtures("one_thread")


def subjects(count=8, seed=1, **ranges):
    return draw_anatomy(count, AnatomyRanges(**ranges), seeded(seed))


def flat_signal(tissues, **ranges):
    """Signals without texture, blur, bias and noise: those of the tissues, and the effects that `ranges` adds."""
    silent = dict.fromkeys(("coil_log", "bias_log", "noise", "blur_px", "texture"), (0, 0))
    look = draw_appearance(len(tissues), AppearanceRanges(**silent, **ranges), seeded(5))
    return signal(tissues, look, seeded(6))


def test_a_batch_has_whole_grey_values_and_every_label():
    images, labels = phantom_slices(24, seed=0, size=64)
    assert images.shape == labels.shape == (24, 1, 64, 64)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.uint8)
    assert images.min() == 0 and images.max() == 255 and torch.equal(images, images.round())
    assert labels.unique().tolist() == [0, 1, 2, 3]


def test_a_batch_is_named_by_seed_and_index():
    images, labels = phantom_slices(2, seed=3, index=4, size=64)
    again = phantom_slices(2, seed=3, index=4, size=64)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    for other in (phantom_slices(2, seed=3, index=5, size=64), phantom_slices(2, seed=4, index=4, size=64)):
        assert not torch.equal(images, other[0])


def test_the_narrow_draw_has_normal_hearts_and_the_wide_one_goes_beyond():
    def pools_brighter_than_muscle(width):
        images, labels = phantom_slices(150, seed=5, size=64, width=width)
        assert images.isfinite().all()
        pool, muscle = (
            (images * (labels == name)).sum((1, 2, 3)) / (labels == name).sum((1, 2, 3)) for name in (LV, MYO)
        )
        has_a_pool = (labels == LV).sum((1, 2, 3)) > 20  # near the apex trabeculae fill what is left of it
        return (pool > muscle)[has_a_pool & muscle.isfinite()].float().mean()

    assert pools_brighter_than_muscle(0.0) == 1
    assert 0.8 < pools_brighter_than_muscle(1.0) < 1
    with pytest.raises(ValueError, match="width from 0"):
        phantom_slices(1, seed=0, size=64, width=1.5)


def test_a_wide_batch_holds_narrow_slices_too():
    narrow, wide = (phantom_slices(400, seed=7, size=32, width=width)[1] for width in (0.0, 1.0))
    hearts = [(labels > 0).sum((1, 2, 3)).float() for labels in (narrow, wide)]
    assert abs(hearts[1].mean() / hearts[0].mean() - 1) < 0.15
    assert hearts[1].std() > 1.05 * hearts[0].std()


def test_some_slices_have_no_heart_and_hearts_have_any_size_and_place():
    _, labels = phantom_slices(400, seed=1, size=64)
    hearts = labels[:, 0] > 0
    area = hearts.sum((1, 2))
    assert 10 < (area == 0).sum() < 80
    assert area.max() > 10 * area[area > 0].min()
    assert hearts.any(0).float().mean() > 0.35  # fraction of the canvas that is heart in some slice


def test_black_bars_cover_image_and_label_alike():
    images, labels = phantom_slices(60, seed=2, size=64)
    barred = (images[:, 0, :, :4].amax((1, 2)) == 0) & (images[:, 0, :, -4:].amax((1, 2)) == 0)
    assert 15 < barred.sum() < 50
    assert (labels[barred][..., :4] == 0).all() and (labels[barred][..., -4:] == 0).all()


def test_at_the_base_the_wall_opens_as_far_as_asked_and_closes_below():
    whole = subjects()
    half = subjects(basal_gap_deg=(180, 180), basal_gap_level=(0.3, 0.3))
    areas = {
        (name, level): (anatomy(body, level=level, phase=0.0)[1] == MYO).sum((1, 2)).float()
        for name, body in (("whole", whole), ("half", half))
        for level in (0.0, 0.4)
    }
    assert (areas["half", 0.0] / areas["whole", 0.0] - 0.5).abs().max() < 0.1
    assert torch.equal(areas["half", 0.4], areas["whole", 0.4])


def test_behind_the_opening_lies_a_pool_without_a_label():
    whole, half = (subjects(basal_gap_deg=(arc, arc), atrium_radius_mm=(20, 20)) for arc in (0, 160))
    pools = [(anatomy(body, level=0.0, phase=0.0)[0] == Tissue.GREAT_VESSEL).sum((1, 2)) for body in (whole, half)]
    assert (pools[1] > pools[0] + 200).all()


def test_the_wall_is_thickest_where_asked():
    def rows(towards):
        body = subjects(
            rv_angle_deg=(180, 180), wall_asymmetry=(0.8, 0.8), wall_asymmetry_deg=(towards, towards), warp_mm=(0, 0)
        )
        _, labels = anatomy(body, level=0.3, phase=0.0)
        row = torch.arange(256)[:, None]
        return ((labels == MYO) * row).sum((1, 2)) / (labels == MYO).sum((1, 2)).clamp_min(1)

    assert (rows(-90) > rows(90)).all()  # the RV lies left, so a quarter turn back (up from the left) is down


def test_round_things_carry_no_label_and_leave_the_heart_whole():
    plain, crowded = subjects(), subjects(round_thing_chance=(1, 1))
    (_, labels), (tissues, beside) = (anatomy(body, level=0.4, phase=0.0, **SMALL) for body in (plain, crowded))
    assert torch.equal(labels, beside)
    assert (tissues == Tissue.DISC_A).any() and (tissues == Tissue.RING_B).any()


def test_an_arbitrary_trunk_keeps_the_contrast_of_the_heart():
    tissues, _ = anatomy(subjects(), level=0.4, phase=0.0, **SMALL)
    image = flat_signal(tissues, arbitrary_trunk_chance=(1, 1))
    assert image[tissues == Tissue.LV_POOL].unique().tolist() == [1.0]
    ranges = AppearanceRanges()
    liver = image[tissues == Tissue.LIVER].unique()
    assert (liver < ranges.liver[0]).any() or (liver > ranges.liver[1]).any()


def test_a_ghost_is_the_picture_again_fainter_and_shifted_down():
    tissues = torch.zeros(1, 64, 64, dtype=torch.uint8)
    tissues[:, 10:14] = Tissue.LV_POOL
    image = flat_signal(tissues, ghost=(0.25, 0.25), ghost_shift=(0.5, 0.5), air=(0, 0))
    assert torch.allclose(image[0, 10:14], torch.ones(4, 64))
    assert torch.allclose(image[0, 42:46], torch.full((4, 64), 0.25))


def test_bands_darken_and_never_brighten():
    tissues = torch.full((2, 96, 96), int(Tissue.LV_POOL), dtype=torch.uint8)
    image = flat_signal(tissues, banding=(0.8, 0.8), banding_turns=(4, 4))
    assert image.max() <= 1 and image.min() == pytest.approx(0.2, abs=0.02)


def test_swirls_darken_the_pools_only():
    tissues, _ = anatomy(subjects(), level=0.3, phase=0.0)
    plain, swirled = flat_signal(tissues), flat_signal(tissues, flow_void=(0.7, 0.7))
    pools = (tissues == Tissue.LV_POOL) | (tissues == Tissue.RV_POOL) | (tissues == Tissue.GREAT_VESSEL)
    assert (swirled[pools] <= plain[pools]).all() and (swirled[pools] < 0.6 * plain[pools]).any()
    assert torch.equal(swirled[~pools], plain[~pools])


def test_layers_of_trabeculae_are_dark_and_belong_to_the_pools():
    smooth = subjects()
    layered = subjects(trabecular_mm=(2, 2), rv_trabecular_mm=(2, 2))
    (plain, labels), (tissues, beside) = (anatomy(body, level=0.4, phase=0.0) for body in (smooth, layered))
    assert torch.equal(labels, beside)
    for tissue, pool in ((Tissue.LV_PAPILLARY, LV), (Tissue.RV_TRABECULA, RV)):
        assert ((tissues == tissue).sum((1, 2)) > (plain == tissue).sum((1, 2)) + 30).all()
        assert (labels[tissues == tissue] == pool).all()


def test_a_layer_around_the_myocardium_looks_like_it_and_has_no_label():
    plain, layered = subjects(), subjects(epicardial_mm=(2, 2))
    (_, labels), (tissues, beside) = (anatomy(body, level=0.4, phase=0.0) for body in (plain, layered))
    assert torch.equal(labels, beside)
    image = flat_signal(tissues)
    outside = (tissues == Tissue.RV_WALL) & (torch.nn.functional.max_pool2d((labels == MYO).float(), 3, 1, 1) > 0)
    for picture, wall, muscle in zip(image, outside, tissues == Tissue.MYO, strict=True):
        assert wall.sum() > 50
        assert picture[wall].unique().tolist() == picture[muscle].unique().tolist()


def test_an_atrium_has_no_layer_that_would_make_it_a_ventricle():
    plain, layered = (anatomy(subjects(epicardial_mm=(mm, mm)), level=-0.04, phase=0.0)[0] for mm in (0, 3))
    assert torch.equal(plain, layered)


def test_above_the_tricuspid_valve_lies_an_atrium_that_looks_like_the_ventricle():
    body = subjects(rv_base_level=(-1, -1), rv_descent=(1.25, 1.25))  # at ES the valve is at level 0.25
    areas = {}
    for phase, level in ((0.0, 0.1), (1.0, 0.0), (1.0, 0.15), (1.0, 0.3)):
        tissues, labels = anatomy(body, level=level, phase=phase)
        areas[phase, level] = (tissues == Tissue.RIGHT_ATRIUM).sum((1, 2)), (labels == RV).sum((1, 2))
        image = flat_signal(tissues)
        assert image[tissues == Tissue.RIGHT_ATRIUM].unique().numel() <= len(image)
    assert all((atrium == 0).all() and (rv > 0).all() for atrium, rv in (areas[0.0, 0.1], areas[1.0, 0.3]))
    assert (areas[1.0, 0.0][0] > 0).all()
    assert (areas[1.0, 0.0][1] < 0.06 * areas[1.0, 0.3][1]).all()  # at most a corner of the outflow tract
    assert (areas[1.0, 0.15][0] > 0).any() and (areas[1.0, 0.15][1] > 0).any()
