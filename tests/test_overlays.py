import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from monai.data import MetaTensor

from components.base.volume_metadata import FRAME
from components.data.slices import IGNORED
from components.data.transforms import LoadVolumed
from components.evaluation.overlays import CLASS_COLOURS, SaveOverlayd, draw_overlay

WHITE = "#ffffff"
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
    """Colour, and the corners of the bounding box of every contour."""
    found = []
    for contour in axes.collections:
        corners = contour.get_paths()[0].get_extents()
        found.append((to_hex(contour.get_edgecolor()[0]), corners.p0.tolist(), corners.p1.tolist()))
    return found


def legend_texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(("depth", "rows", "columns"), [(2, 1, 2), (6, 1, 6), (10, 2, 5), (17, 3, 6), (18, 3, 6)])
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


def test_prediction_is_coloured_and_truth_white_around_the_outer_voxels():
    axes = draw(label_map(row=10, column=8, depth=2), label_map(row=11, column=8, depth=2)).axes[0]
    assert contours(axes) == [(LV, [10.5, 7.5], [14.5, 11.5]), (WHITE, [9.5, 7.5], [13.5, 11.5])]


def test_a_line_of_one_voxel_is_filled_with_its_colour():
    pred = np.zeros((40, 30, 2), dtype=np.uint8)
    pred[5:30, 12] = 2
    shades = draw(None, pred).axes[0].images[1].get_array()
    assert {to_hex(shade) for shade in shades[12, 5:30]} == {MYO}
    assert np.count_nonzero(shades[..., 3]) == 25


def test_a_picture_is_shown_whole_in_its_colours_with_its_truth_beside_the_prediction():
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 1, 3))
    figure = draw_overlay(image, label_map(), label_map(row=11), spacing_mm=(1, 1, 1), title="case")
    prediction, truth = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["prediction", "truth"]
    for axes in figure.axes:
        assert np.array_equal(axes.images[0].get_array(), image[:, :, 0].swapaxes(0, 1))
        assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, 39.5), (29.5, -0.5))
    assert [colour for colour, *_ in contours(prediction)] == [LV]
    assert [colour for colour, *_ in contours(truth)] == [WHITE]


def test_a_large_picture_is_drawn_with_a_dot_for_each_of_its_pixels():
    large = np.zeros((900, 800, 1), dtype=np.uint8)
    figure = draw(None, large)
    figure.draw_without_rendering()
    assert figure.axes[0].get_window_extent().width * 150 / figure.dpi > 0.9 * 900


def test_every_class_has_its_colour():
    pred = label_map(value=1) + label_map(value=2, row=15) + label_map(value=3, row=20)
    assert [colour for colour, *_ in contours(draw(None, pred).axes[0])] == [RV, MYO, LV]


def test_outline_is_closed_at_the_border_of_the_slice():
    (axes,) = draw(None, label_map(row=36, column=0)).axes
    assert contours(axes) == [(LV, [35.5, -0.5], [39.5, 3.5])]


def test_panels_are_cropped_to_all_foreground_plus_15_mm():
    panel = draw(label_map(row=18, depth=2), label_map(row=20, depth=2), spacing_mm=(3.0, 5.0, 10.0)).axes[0]
    # Rows 18..23, 5 voxels of 3 mm around; columns 8..11, 3 voxels of 5 mm around. Edges lie half a voxel off.
    assert panel.get_xlim() == (12.5, 28.5)
    assert panel.get_ylim() == (14.5, 4.5)


def test_voxels_that_nobody_annotated_are_neither_drawn_nor_foreground():
    label = label_map(depth=2)
    known = draw(label, label_map(depth=2)).axes[0]
    label[label == 0] = IGNORED
    shown = draw(label, label_map(depth=2)).axes[0]
    assert contours(shown) == contours(known)
    assert (shown.get_xlim(), shown.get_ylim()) == (known.get_xlim(), known.get_ylim())


def test_whole_slice_without_foreground():
    nothing = np.zeros((40, 30, 2), dtype=np.uint8)
    panel = draw(nothing, nothing).axes[0]
    assert (panel.get_xlim(), panel.get_ylim()) == ((-0.5, 39.5), (29.5, -0.5))
    assert contours(panel) == []


def test_pixels_have_the_aspect_of_the_spacing():
    assert draw(None, label_map(), spacing_mm=(1.0, 2.0, 10.0)).axes[0].get_aspect() == 2.0


def test_legend_names_classes_and_contours():
    assert legend_texts(draw(label_map(), label_map())) == ["RV", "Myo", "LV", "truth"]
    assert legend_texts(draw(None, label_map())) == ["RV", "Myo", "LV"]


def test_drawing_leaves_pyplot_alone():
    before = plt.get_fignums()
    draw(label_map(), label_map())
    assert plt.get_fignums() == before


def test_label_on_another_grid_is_an_error():
    with pytest.raises(ValueError, match="one grid"):
        draw(label_map(size=(30, 40)), label_map())


@pytest.fixture
def case(tmp_path):
    """A volume's file with labels on its grid, as an evaluation has them."""
    file = tmp_path / "patient001_frame01.nii.gz"
    voxels = np.random.default_rng(0).random((40, 30, 2), np.float32)
    nib.save(nib.Nifti1Image(voxels, np.diag([-1.5, -1.5, 10.0, 1.0])), file)
    meta = LoadVolumed("image")({"image": str(file)})["image"].meta
    maps = {"label": label_map(depth=2, row=9), "pred": label_map(depth=2)}
    return {key: MetaTensor(labels[None], meta=meta) for key, labels in maps.items()}


def test_transform_writes_a_picture_and_passes_the_data_on(tmp_path, case):
    copies = {key: value.clone() for key, value in case.items()}
    result = SaveOverlayd(tmp_path / "overlays")(case)
    assert [path.name for path in (tmp_path / "overlays").iterdir()] == ["patient001_frame01_overlay.png"]
    assert list(result) == list(case)
    assert all(result[key] is case[key] and torch.equal(result[key], copies[key]) for key in case)


def test_transform_takes_voxels_spacing_and_title_from_the_file(tmp_path, case):
    SaveOverlayd(tmp_path)(case)
    label, pred = (case[key][0].numpy() for key in ("label", "pred"))
    image = nib.load(tmp_path / "patient001_frame01.nii.gz").get_fdata(dtype=np.float32)
    figure = draw_overlay(image, label, pred, spacing_mm=(1.5, 1.5, 10.0), title="patient001_frame01")
    figure.savefig(tmp_path / "expected.png", dpi=150)
    written, expected = (plt.imread(tmp_path / name) for name in ("patient001_frame01_overlay.png", "expected.png"))
    assert np.array_equal(written, expected)


def test_transform_without_truth_draws_the_prediction(tmp_path, case):
    SaveOverlayd(tmp_path / "both")(case)
    del case["label"]
    SaveOverlayd(tmp_path / "alone")(case)
    both, alone = (plt.imread(next((tmp_path / folder).iterdir())) for folder in ("both", "alone"))
    assert not np.array_equal(both, alone)


def test_later_frames_of_a_cine_are_not_drawn(tmp_path, case):
    case["pred"].meta[FRAME] = 1
    SaveOverlayd(tmp_path / "overlays")(case)
    assert not (tmp_path / "overlays").exists()


def test_one_hot_prediction_is_an_error(tmp_path, case):
    case["pred"] = case["pred"].repeat(4, 1, 1, 1)
    with pytest.raises(ValueError, match="to_onehot only after"):
        SaveOverlayd(tmp_path)(case)


def test_prediction_without_metadata_is_an_error(tmp_path, case):
    with pytest.raises(ValueError, match="LoadImaged"):
        SaveOverlayd(tmp_path)({"pred": case["pred"].as_tensor()})
