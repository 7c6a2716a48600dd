import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from monai.data import MetaTensor

from components.data.transforms import NeighbourSlicesd
from components.evaluation.overlays import CLASS_COLOURS, SaveOverlayd, draw_overlay

RV, MYO, LV = (colour.lower() for colour in CLASS_COLOURS[:3])


def label_map(*, size=(40, 30), depth=1, row=10, column=8, value=3):
    """A 4x4 block of one class with its first corner at (row, column), in every slice."""
    labels = np.zeros((*size, depth), dtype=np.uint8)
    labels[row : row + 4, column : column + 4] = value
    return labels


def draw(label, pred, spacing_mm=(1.0, 1.0, 10.0)):
    image = np.arange(pred.size, dtype=np.float32).reshape(pred.shape)
    return draw_overlay(image, label, pred, spacing_mm=spacing_mm, title="case")


def contours(axes):
    """Colour, whether dashed, and the corners of the bounding box of every contour."""
    found = []
    for contour in axes.collections:
        corners = contour.get_paths()[0].get_extents()
        dashed = contour.get_linestyle()[0][1] is not None
        found.append((to_hex(contour.get_edgecolor()[0]), dashed, corners.p0.tolist(), corners.p1.tolist()))
    return found


def legend_texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(("depth", "rows", "columns"), [(1, 1, 1), (6, 1, 6), (10, 2, 5), (17, 3, 6), (18, 3, 6)])
def test_one_panel_a_slice_in_equal_rows(depth, rows, columns):
    axes = draw(label_map(depth=depth), label_map(depth=depth)).axes
    assert axes[0].get_subplotspec().get_gridspec().get_geometry() == (rows, columns)
    assert [a.get_title() for a in axes if a.axison] == [f"slice {z + 1} of {depth}" for z in range(depth)]
    for z, panel in enumerate(axes[:depth]):
        assert panel.images[0].get_array()[0, 0] == z  # the voxel (0, 0, z) of the counting image


def test_array_axis_0_runs_right_and_axis_1_down():
    panel = draw(label_map(), label_map()).axes[0]
    assert panel.images[0].get_array().shape == (30, 40)
    assert panel.images[0].get_array()[0].tolist() == [30.0 * x for x in range(40)]
    assert panel.get_xlim()[0] < panel.get_xlim()[1]
    assert panel.get_ylim()[0] > panel.get_ylim()[1]


def test_truth_is_solid_and_prediction_dashed_around_the_outer_voxels():
    (axes,) = draw(label_map(row=10, column=8), label_map(row=11, column=8)).axes
    assert contours(axes) == [
        (LV, False, [9.5, 7.5], [13.5, 11.5]),
        (LV, True, [10.5, 7.5], [14.5, 11.5]),
    ]


def test_every_class_has_its_colour():
    pred = label_map(value=1) + label_map(value=2, row=15) + label_map(value=3, row=20)
    assert [colour for colour, *_ in contours(draw(None, pred).axes[0])] == [RV, MYO, LV]


def test_outline_is_closed_at_the_border_of_the_slice():
    (axes,) = draw(None, label_map(row=36, column=0)).axes
    assert contours(axes) == [(LV, True, [35.5, -0.5], [39.5, 3.5])]


def test_panels_are_cropped_to_all_foreground_plus_15_mm():
    panel = draw(label_map(row=18), label_map(row=20), spacing_mm=(3.0, 5.0, 10.0)).axes[0]
    # Rows 18..23, 5 voxels of 3 mm around; columns 8..11, 3 voxels of 5 mm around. Edges lie half a voxel off.
    assert panel.get_xlim() == (12.5, 28.5)
    assert panel.get_ylim() == (14.5, 4.5)


def test_whole_slice_without_foreground():
    nothing = np.zeros((40, 30, 2), dtype=np.uint8)
    panel = draw(nothing, nothing).axes[0]
    assert (panel.get_xlim(), panel.get_ylim()) == ((-0.5, 39.5), (29.5, -0.5))
    assert contours(panel) == []


def test_pixels_have_the_aspect_of_the_spacing():
    assert draw(None, label_map(), spacing_mm=(1.0, 2.0, 10.0)).axes[0].get_aspect() == 2.0


def test_legend_names_classes_and_contours():
    assert legend_texts(draw(label_map(), label_map())) == ["RV", "Myo", "LV", "truth", "prediction"]
    assert legend_texts(draw(None, label_map())) == ["RV", "Myo", "LV", "prediction"]


def test_drawing_leaves_pyplot_alone():
    before = plt.get_fignums()
    draw(label_map(), label_map())
    assert plt.get_fignums() == before


def test_label_on_another_grid_is_an_error():
    with pytest.raises(ValueError, match="one grid"):
        draw(label_map(size=(30, 40)), label_map())


def case(image_channels=3, affine=(-1.5, -1.5, 10.0, 1.0)):
    pred = label_map(depth=2)
    image = MetaTensor(
        torch.rand(image_channels, *pred.shape, generator=torch.Generator().manual_seed(0)),
        affine=torch.diag(torch.tensor(affine)),
        meta={"filename_or_obj": "data/patient001_frame01.nii.gz"},
    )
    return {"image": image, "label": MetaTensor(label_map(depth=2, row=9)[None]), "pred": MetaTensor(pred[None])}


@pytest.mark.parametrize("image_channels", [1, 3])
def test_transform_writes_a_picture_and_passes_the_data_on(tmp_path, image_channels):
    data = case(image_channels)
    copies = {key: value.clone() for key, value in data.items()}
    result = SaveOverlayd(tmp_path / "overlays")(data)
    assert [path.name for path in (tmp_path / "overlays").iterdir()] == ["patient001_frame01_overlay.png"]
    picture = plt.imread(tmp_path / "overlays" / "patient001_frame01_overlay.png")
    assert np.ptp(picture[..., :3], axis=-1).max() > 0.5  # coloured contours on grey
    assert list(result) == list(data)
    assert all(result[key] is data[key] and torch.equal(result[key], copies[key]) for key in data)


def test_transform_takes_spacing_and_title_from_the_image(tmp_path):
    data = case()
    SaveOverlayd(tmp_path)(data)
    label, pred = (data[key][0].numpy() for key in ("label", "pred"))
    image = data["image"][1].numpy()
    figure = draw_overlay(image, label, pred, spacing_mm=(1.5, 1.5, 10.0), title="patient001_frame01")
    figure.savefig(tmp_path / "expected.png", dpi=150)
    written, expected = (plt.imread(tmp_path / name) for name in ("patient001_frame01_overlay.png", "expected.png"))
    assert np.array_equal(written, expected)


def test_a_slice_between_its_neighbours_is_drawn_under_its_own_contours(tmp_path):
    data = case(image_channels=1)
    SaveOverlayd(tmp_path / "alone")(data)
    SaveOverlayd(tmp_path / "widened")(NeighbourSlicesd("image")(data))
    alone, widened = (plt.imread(next((tmp_path / folder).iterdir())) for folder in ("alone", "widened"))
    assert np.array_equal(alone, widened)


@pytest.mark.parametrize("label_key", ["label", None])
def test_transform_without_truth_draws_the_prediction(tmp_path, label_key):
    data = case()
    del data["label"]
    SaveOverlayd(tmp_path, label_key=label_key)(data)
    assert (tmp_path / "patient001_frame01_overlay.png").stat().st_size > 0


def test_one_hot_prediction_is_an_error(tmp_path):
    data = case()
    data["pred"] = data["pred"].repeat(4, 1, 1, 1)
    with pytest.raises(ValueError, match="to_onehot only after"):
        SaveOverlayd(tmp_path)(data)


def test_image_without_header_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="LoadImaged"):
        SaveOverlayd(tmp_path)({**case(), "image": torch.rand(1, 40, 30, 2)})
