import math

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.handlers import StatsHandler, TensorBoardStatsHandler, from_engine
from monai.metrics import SurfaceDistanceMetric
from scipy.ndimage import binary_erosion
from torch.nn.functional import one_hot

from components.evaluation.metrics import (
    VolumeAssd,
    VolumeAssdHandler,
    VolumeDice,
    VolumeDiceHandler,
    assd_per_class_mm,
    dice_per_class,
)

EMPTY = torch.zeros(6, 6, dtype=torch.long)
# Every voxel of a 2x2 square is surface.
SQUARE = torch.tensor(
    [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
)
SQUARE_DOWN = SQUARE.roll(1, dims=0)
SQUARE_RIGHT = SQUARE.roll(1, dims=1)


def encode(*label_maps, num_classes=2):
    """One-hot batch (B,C,spatial...) of label maps (spatial...)."""
    return one_hot(torch.stack(label_maps), num_classes).movedim(-1, 1).float()


def with_spacing(channel_first, *spacing_mm):
    return MetaTensor(channel_first, affine=torch.diag(torch.tensor([*spacing_mm, 1.0], dtype=torch.float64)))


def random_blobs(seed):
    noise = torch.randn(2, 24, 20, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool3d(noise[:, None], (5, 5, 3), stride=1, padding=(2, 2, 1))[:, 0]
    return torch.bucketize(smooth, torch.tensor([0.0, 0.1, 0.2]))


def test_two_squares_shifted_by_one_voxel_along_the_coarse_axis():
    y_pred, y = encode(SQUARE_DOWN), encode(SQUARE)
    assert dice_per_class(y_pred, y).tolist() == [[0.5]]  # 2 of 4 + 4 voxels shared
    # Two of each square's four voxels touch the other, two lie 2 mm off.
    assert assd_per_class_mm(y_pred, y, spacing_mm=(2.0, 1.0)).tolist() == [[1.0]]


def test_two_squares_shifted_by_one_voxel_along_the_fine_axis():
    assert assd_per_class_mm(encode(SQUARE_RIGHT), encode(SQUARE), spacing_mm=(2.0, 1.0)).tolist() == [[0.5]]


def test_distances_of_both_directions_are_pooled_before_the_mean():
    dot, bar = EMPTY.clone(), EMPTY.clone()
    dot[1, 1] = 1
    bar[1, 1:4] = 1
    # 0 from the dot; 0, 1 and 2 from the bar: 3/4, where the mean of the two means would be 1/2.
    assert assd_per_class_mm(encode(bar), encode(dot), spacing_mm=(1.0, 1.0)).tolist() == [[0.75]]


def test_single_slice_volume():
    y_pred, y = encode(SQUARE_DOWN[..., None]), encode(SQUARE[..., None])
    assert dice_per_class(y_pred, y).tolist() == [[0.5]]
    assert assd_per_class_mm(y_pred, y, spacing_mm=(2.0, 1.0, 10.0)).tolist() == [[1.0]]


@pytest.mark.parametrize("truth_is_empty", [True, False])
def test_one_mask_empty_scores_zero_dice_and_the_diagonal(truth_is_empty):
    full, empty = torch.ones(2, 4, 12, dtype=torch.long), torch.zeros(2, 4, 12, dtype=torch.long)
    y_pred, y = (encode(full), encode(empty)) if truth_is_empty else (encode(empty), encode(full))
    assert dice_per_class(y_pred, y).tolist() == [[0.0]]
    # 2 x 1.5 mm, 4 x 1 mm, 12 x 1 mm: the diagonal of a box of 3, 4 and 12 mm is 13 mm.
    assert assd_per_class_mm(y_pred, y, spacing_mm=(1.5, 1.0, 1.0)).tolist() == [[pytest.approx(13.0)]]


def test_both_masks_empty_is_undefined():
    y = encode(EMPTY)
    assert math.isnan(dice_per_class(y, y).item())
    assert math.isnan(assd_per_class_mm(y, y, spacing_mm=(1.0, 1.0)).item())


def test_equal_masks_are_perfect_and_scores_are_float64_without_background():
    y = encode(SQUARE * 2, num_classes=4)
    dice, assd = dice_per_class(y, y), assd_per_class_mm(y, y, spacing_mm=(1.0, 1.0))
    assert dice.dtype == assd.dtype == torch.float64
    torch.testing.assert_close(dice, torch.tensor([[math.nan, 1, math.nan]], dtype=torch.float64), equal_nan=True)
    torch.testing.assert_close(assd, torch.tensor([[math.nan, 0, math.nan]], dtype=torch.float64), equal_nan=True)


def test_equals_monai_where_both_masks_hold_voxels():
    y_pred, y = (one_hot(random_blobs(seed), 4).movedim(-1, 1).float() for seed in (0, 1))
    expected = SurfaceDistanceMetric(symmetric=True)(y_pred, y, spacing=(1.5, 1.25, 10.0))
    assert torch.isfinite(expected).all()
    assert (expected > 0).all()
    torch.testing.assert_close(assd_per_class_mm(y_pred, y, (1.5, 1.25, 10.0)), expected.double())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scores_do_not_depend_on_the_device():
    y_pred, y = (one_hot(random_blobs(seed), 4).movedim(-1, 1).float() for seed in (0, 1))
    on_gpu = assd_per_class_mm(y_pred.cuda(), y.cuda(), (1.5, 1.25, 10.0))
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), assd_per_class_mm(y_pred, y, (1.5, 1.25, 10.0)))
    metric = VolumeDice()
    metric(y_pred.cuda(), y)
    assert torch.equal(metric.get_buffer().cpu(), dice_per_class(y_pred, y))


def test_mean_is_over_volumes_first_then_over_classes():
    metric = VolumeDice()
    # Class 1: perfect, false alarm. Class 2: absent from both, perfect.
    metric(encode(SQUARE, num_classes=3), encode(SQUARE, num_classes=3))
    two = EMPTY.clone()
    two[5, 5] = 2
    metric(encode(SQUARE + two, num_classes=3), encode(two, num_classes=3))
    torch.testing.assert_close(
        metric.get_buffer(), torch.tensor([[1, math.nan], [0, 1]], dtype=torch.float64), equal_nan=True
    )
    assert metric.aggregate().item() == 0.75  # (1/2 + 1) / 2; over the three scores it would be 2/3
    in_pred, in_truth = metric.get_presence()
    assert in_pred.tolist() == [[True, False], [True, True]]
    assert in_truth.tolist() == [[True, False], [False, True]]


def test_mean_of_nothing_but_undefined_scores_is_undefined():
    metric = VolumeDice()
    metric(encode(EMPTY), encode(EMPTY))
    assert math.isnan(metric.aggregate().item())


def test_no_volume_at_all_is_an_error():
    with pytest.raises(ValueError, match="no scores yet"):
        VolumeDice().aggregate()


def test_every_volume_is_measured_by_its_own_affine():
    metric = VolumeAssd()
    truth = encode(SQUARE)[0]
    scores = metric([encode(SQUARE_DOWN)[0]] * 2, [with_spacing(truth, -2.0, 1.0), with_spacing(truth, 5.0, 1.0)])
    assert scores.tolist() == [[1.0], [2.5]]


def test_spacing_follows_the_array_axes_of_a_rotated_affine():
    axes_swapped = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    y = MetaTensor(encode(SQUARE)[0], affine=axes_swapped)
    assert VolumeAssd()([encode(SQUARE_DOWN)[0]], [y]).item() == 1.0  # array axis 0 steps 2 mm


@pytest.mark.parametrize("wrap", [lambda y: y, MetaTensor])
def test_unknown_spacing_is_an_error_never_one_millimetre(wrap):
    with pytest.raises(ValueError, match="without a header's affine: keep the metadata of LoadImaged"):
        VolumeAssd()([encode(SQUARE_DOWN)[0]], [wrap(encode(SQUARE)[0])])


def test_one_millimetre_from_a_file_counts():
    y = MetaTensor(encode(SQUARE)[0], meta={"filename_or_obj": "a.nii.gz"})
    assert VolumeAssd()([encode(SQUARE_DOWN)[0]], [y]).item() == 0.5


def outline_distance(mask, other):
    """Distances from the outline of a mask to that of another, in pixels, by the definition."""
    outlines = [np.argwhere(each & ~binary_erosion(each)) for each in (mask, other)]
    return np.linalg.norm(outlines[0][:, None] - outlines[1][None], axis=2).min(axis=1)


def test_a_picture_is_measured_in_2d_in_pixels():
    truth = torch.zeros(40, 40, dtype=torch.long)
    truth[8:24, 8:24] = 1
    pred = truth.roll(4, dims=1)
    both = [each.bool().numpy() for each in (pred, truth)]
    expected = np.concatenate([outline_distance(*both), outline_distance(*both[::-1])]).mean()
    one_hot_pred, one_hot_truth = (encode(each[..., None])[0] for each in (pred, truth))
    picture, volume = (
        MetaTensor(one_hot_truth, affine=torch.diag(torch.tensor([-1.0, -1, 1, 1])), meta={"filename_or_obj": name})
        for name in ("cells/1.png", "slice.nii.gz")
    )
    scores = VolumeAssd()([one_hot_pred] * 2, [picture, volume])[:, 0].tolist()
    assert scores[0] == pytest.approx(expected)
    assert expected > 1.9
    assert scores[1] == assd_per_class_mm(one_hot_pred[None], one_hot_truth[None], (1.0, 1.0, 1.0)).item() < 1
    assert VolumeAssd()([encode(EMPTY[..., None])[0]], [picture[:, :6, :6]]).isnan().all()
    missed = VolumeAssd()([encode(torch.zeros_like(truth)[..., None])[0]], [picture]).item()
    assert missed == pytest.approx(40 * math.sqrt(2))  # the diagonal of the picture


@pytest.mark.parametrize(
    ("y_pred", "message"),
    [
        (encode(SQUARE, num_classes=3), "of one shape"),
        (encode(SQUARE) * 3.5, "one-hot"),
        (encode(SQUARE) * math.nan, "one-hot"),
        (torch.ones(1, 2, 6, 6), "one-hot"),
    ],
)
def test_wrong_prediction_is_an_error(y_pred, message):
    with pytest.raises(ValueError, match=message):
        dice_per_class(y_pred, encode(SQUARE))


def test_label_map_instead_of_one_hot_is_an_error():
    with pytest.raises(ValueError, match="to_onehot"):
        dice_per_class(SQUARE[None, None], SQUARE[None, None])


@pytest.mark.parametrize("spacing_mm", [(1.0,), (1.0, 0.0), (1.0, math.nan)])
def test_wrong_spacing_is_an_error(spacing_mm):
    with pytest.raises(ValueError, match="2 positive spacings"):
        assd_per_class_mm(encode(SQUARE), encode(SQUARE), spacing_mm)


def run_engine(handlers, others=()):
    """Score one volume: RV shifted by one voxel of 2 mm, Myo missed, LV absent from both."""
    truth = SQUARE.clone()
    truth[5, 5] = 2
    pair = {
        "pred": encode(SQUARE_DOWN, num_classes=4)[0],
        "label": with_spacing(encode(truth, num_classes=4)[0], 2.0, 1.0),
    }
    engine = Engine(lambda *_: [pair])
    for name, handler in handlers.items():
        handler.attach(engine, name)
    for other in others:
        other.attach(engine)
    engine.run([0])
    return engine.state


def test_handlers_report_the_mean_and_every_class():
    take = from_engine(["pred", "label"])
    state = run_engine(
        {"dice": VolumeDiceHandler(output_transform=take), "assd": VolumeAssdHandler(output_transform=take)}
    )
    diagonal_mm = math.hypot(6 * 2, 6)
    expected = {
        "dice": 0.25,
        "dice_RV": 0.5,
        "dice_Myo": 0.0,
        "dice_LV": math.nan,
        "assd": (1 + diagonal_mm) / 2,
        "assd_RV": 1.0,
        "assd_Myo": diagonal_mm,
        "assd_LV": math.nan,
    }
    assert state.metrics == pytest.approx(expected, nan_ok=True)
    assert state.metric_details["assd"].shape == (1, 3)
    assert state.metric_details["assd_in_pred"].tolist() == [[True, False, False]]
    assert state.metric_details["assd_in_truth"].tolist() == [[True, True, False]]


def test_handler_without_details_keeps_none():
    state = run_engine({"dice": VolumeDiceHandler(output_transform=from_engine(["pred", "label"]), save_details=False)})
    assert state.metrics["dice"] == 0.25
    assert not hasattr(state, "metric_details")


def test_handler_with_too_few_class_names_is_an_error():
    handler = VolumeDiceHandler(output_transform=from_engine(["pred", "label"]), class_names=("RV", "Myo"))
    with pytest.raises(ValueError, match="class_names"):
        run_engine({"dice": handler})


def test_logging_handlers_take_undefined_classes(tmp_path, capsys):
    class Writer:
        def __init__(self):
            self.scalars = {}

        def add_scalar(self, name, value, _):
            self.scalars[name] = value

        def flush(self):
            pass

    writer = Writer()
    loggers = (
        StatsHandler(name="stats", iteration_log=False),
        TensorBoardStatsHandler(writer, log_dir=str(tmp_path), iteration_log=False),
    )
    run_engine({"dice": VolumeDiceHandler(output_transform=from_engine(["pred", "label"]))}, loggers)
    assert "dice_LV: nan" in capsys.readouterr().out
    assert writer.scalars["dice_RV"] == 0.5
    assert math.isnan(writer.scalars["dice_LV"])
