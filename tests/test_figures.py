"""The figures of a study, and the embeddings that one of them shows."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import labels_of, mark_finished
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from components.base.volume_metadata import case_name
from components.data.acdc import read_acdc
from components.data.cases import list_cases
from components.evaluation.overlays import CLASS_COLOURS
from components.networks.trained_with import encode_record
from components.phantom.dataset import write_phantom_dataset
from components.phantom.slices import phantom_slices
from components.pretrained import pretrained_file
from components.sam.encoder import SamEncoder
from study.grid import Cell, Method, Variant
from study.report.contours import draw_contours
from study.report.embeddings import PHANTOMS, draw_embeddings, embed_slices, embedding_cell
from study.report.figures import draw_bland_altman, draw_dice_by_patients, save_figure

pytestmark = pytest.mark.usefixtures("one_thread")

NAN = float("nan")
CNN = Method("cnn", "CNN head", "cnnhead_acdc")
AUTOSAM = Method("vit", "AutoSAM", "autosam_acdc")
BOX = Method("box", "SAM (box)", "sambox_acdc")
SIZE = (40, 30, 3)
FULLEST = 2  # the slice with the largest truth


def block(row, *, side, value=3):
    labels = np.zeros(SIZE, dtype=np.uint8)
    labels[row : row + side, 10 : 10 + side] = value
    return labels


def save(array, path):
    nib.save(nib.Nifti1Image(array, np.diag([3.0, 3.0, 10.0, 1.0])), path)


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """Ten patients, two of them in each test set. Every case has an LV of 2x2 voxels, in one slice of 6x6 voxels."""
    root = tmp_path_factory.mktemp("acdc")
    image = np.arange(np.prod(SIZE), dtype=np.int16).reshape(SIZE)
    truth = block(18, side=2)
    truth[..., FULLEST] = block(18, side=6)[..., 0]
    for number in range(1, 11):
        folder = root / f"training/patient{number:03d}"
        folder.mkdir(parents=True)
        for frame in (1, 9):
            save(image, folder / f"{folder.name}_frame{frame:02d}.nii.gz")
            save(truth, folder / f"{folder.name}_frame{frame:02d}_gt.nii.gz")
        (folder / "Info.cfg").write_text("ED: 1\nES: 9\n")
    return str(root)


def finish(cell, output_dir, dataset_dir, *, dice=(0.9, 0.8, 0.7, 0.6), pred=None):
    """A finished cell with the same prediction of all four test cases and a Dice for each."""
    folder = output_dir / cell.name
    (folder / "eval").mkdir(parents=True)
    mark_finished(folder)
    cases = cases_of(dataset_dir, cell.split)
    for case in cases:
        save(block(20, side=6) if pred is None else pred, folder / f"eval/{case}_pred.nii.gz")
    rows = [(case, name, value, 1.0) for case, value in zip(cases, dice, strict=True) for name in ("RV", "Myo", "LV")]
    table = pd.DataFrame(rows, columns=["case", "class", "dice", "assd_mm"])
    table.to_csv(folder / "eval/metrics.csv", index=False)
    return cell


def cases_of(dataset_dir, split):
    return [case_name(case["image"]) for case in list_cases(read_acdc(dataset_dir), "test", split_seed=split)]


def rows_of_panels(figure):
    """The panels that are not empty, row by row."""
    rows = {}
    for axes in figure.axes:
        if axes.axison:
            rows.setdefault(axes.get_subplotspec().rowspan.start, []).append(axes)
    return list(rows.values())


def legend_texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_contours_show_worst_median_and_best_case_over_all_methods(patients, tmp_path):
    cells = [
        finish(Cell(CNN, 1, 0), tmp_path, patients, dice=(0.9, 0.1, 0.3, 0.6)),
        finish(Cell(BOX, 0, 0), tmp_path, patients, dice=(0.7, 0.5, 0.1, 0.8)),
    ]
    # Averaged over both methods the cases have 80, 30, 20 and 70 %; the lower of the two middle ones is the median.
    best, median, worst, _ = cases_of(patients, 0)
    rows = rows_of_panels(draw_contours(cells, tmp_path, dataset_dir=patients, labelled_cases=1))
    assert [row[0].get_ylabel().splitlines()[:2] for row in rows] == [
        ["worst", worst],
        ["median", median],
        ["best", best],
    ]
    assert [axes.get_title() for axes in rows[0]] == ["truth", "CNN head", "SAM (box)"]
    assert [axes.get_xlabel() for axes in rows[2]] == ["", "Dice 90.0 %", "Dice 70.0 %"]


def test_contours_are_of_the_fullest_slice_and_cropped_alike(patients, tmp_path):
    cells = [finish(Cell(CNN, 1, 0), tmp_path, patients), finish(Cell(BOX, 0, 0), tmp_path, patients)]
    figure = draw_contours(cells, tmp_path, dataset_dir=patients, labelled_cases=1)
    for row in rows_of_panels(figure):
        assert row[0].get_ylabel().endswith("slice 3 of 3")
        for axes in row:
            assert axes.images[0].get_array()[0, :2].tolist() == [FULLEST, 30 * 3 + FULLEST]  # voxels (0,0) and (1,0)
            # Rows 18..25 and columns 10..15 of truth and prediction, with a margin of 15 mm (5 voxels) and half a voxel
            assert axes.get_xlim() == (12.5, 30.5)
            assert axes.get_ylim() == (20.5, 4.5)
        truth, prediction, _ = (axes.collections[0] for axes in row)
        assert truth.get_paths()[0].get_extents().extents.tolist() == [17.5, 9.5, 23.5, 15.5]
        assert prediction.get_paths()[0].get_extents().extents.tolist() == [19.5, 9.5, 25.5, 15.5]
        assert to_hex(truth.get_edgecolor()[0]) == CLASS_COLOURS[2].lower()
    assert legend_texts(figure) == ["RV", "Myo", "LV"]


def test_contours_are_of_the_split_with_the_most_methods_and_of_one_number_of_patients(patients, tmp_path):
    """Split 1 has both methods; those that train are shown with the given number of patients, without ablations."""
    cells = [Cell(AUTOSAM, 5, 1), Cell(CNN, 5, 0), Cell(BOX, 0, 0)]
    for cell in [Cell(CNN, 0, 1), Cell(CNN, 1, 1), Cell(BOX, 0, 1), Cell(CNN, 5, 1, Variant("depth", "2"))]:
        cells.append(finish(cell, tmp_path, patients))
    cells += [finish(Cell(CNN, 1, 0), tmp_path, patients), finish(Cell(CNN, 5, 2), tmp_path, patients)]
    figure = draw_contours(cells, tmp_path, dataset_dir=patients, labelled_cases=1)
    rows = rows_of_panels(figure)
    assert [axes.get_title() for axes in rows[0]] == ["truth", "CNN head", "SAM (box)"]
    assert {row[0].get_ylabel().splitlines()[1] for row in rows} <= set(cases_of(patients, 1))
    five = rows_of_panels(draw_contours(cells, tmp_path, dataset_dir=patients, labelled_cases=5))
    assert [axes.get_title() for axes in five[0]] == ["truth", "SAM (box)"]


def test_many_methods_are_wrapped_with_the_truth_in_every_row(patients, tmp_path):
    methods = [Method(f"m{number}", f"method {number}", "cnnhead_acdc") for number in range(7)]
    cells = [finish(Cell(method, 1, 0), tmp_path, patients) for method in methods]
    rows = rows_of_panels(draw_contours(cells, tmp_path, dataset_dir=patients, labelled_cases=1))
    assert [len(row) for row in rows] == [5, 5, 5, 4, 4, 4]
    titles = [axes.get_title() for row in (rows[0], rows[3]) for axes in row]
    assert titles == ["truth", *(m.title for m in methods[:4]), "truth", *(m.title for m in methods[4:])]


def test_a_prediction_on_another_grid_is_an_error(patients, tmp_path):
    cell = finish(Cell(CNN, 1, 0), tmp_path, patients, pred=block(20, side=6)[:-1])
    with pytest.raises(ValueError, match="on its grid"):
        draw_contours([cell], tmp_path, dataset_dir=patients, labelled_cases=1)


def test_nothing_finished_draws_nothing(patients, tmp_path):
    assert draw_contours([Cell(CNN, 1, 0)], tmp_path, dataset_dir=patients, labelled_cases=1) is None


def scores(method, *percent, labelled_patients=1, split=0, value=""):
    """One volume for each given number, with this Dice in all classes."""
    cases = [f"patient{number:03d}_frame01" for number in range(1, len(percent) + 1)]
    return pd.DataFrame(
        labels_of(method, labelled_patients, split, value) | {"case": case, "class": name, "dice": p / 100}
        for case, p in zip(cases, percent, strict=True)
        for name in ("RV", "Myo", "LV")
    )


def dice_figure(*tables, published=None):
    return draw_dice_by_patients(pd.concat(tables, ignore_index=True), published or {})


def test_dice_rises_along_the_numbers_of_patients_with_its_spread_over_splits():
    figure = dice_figure(
        scores(CNN, 30, 50, labelled_patients=1),
        scores(CNN, 60, labelled_patients=1, split=1),
        scores(CNN, 80, labelled_patients=70),
        scores(CNN, 10, labelled_patients=70, value="2"),
    )
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "70"]
    (bars,) = axes.containers
    assert bars.lines[0].get_xydata().ravel().tolist() == pytest.approx([0, 50, 1, 80])  # mean of 40 and 60
    spread = bars.lines[2][0].get_segments()[0][:, 1]
    assert spread.tolist() == pytest.approx([50 - 10 * 2**0.5, 50 + 10 * 2**0.5])
    assert legend_texts(figure) == ["CNN head"]


def test_published_dice_is_hollow_in_the_colour_of_its_method():
    trained = [scores(method, p, labelled_patients=n) for method in (CNN, AUTOSAM) for n, p in ((1, 30), (5, 60))]
    figure = dice_figure(*trained, published={"AutoSAM": {1: 39.3, 70: 90.1}, "UNet": {2: 17.6}})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5", "70"]
    hollow = [line for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xdata())]
    assert [list(line.get_ydata()) for line in hollow] == [[39.3, 90.1]]
    assert hollow[0].get_markerfacecolor() == "none"
    filled = axes.containers[1].lines[0]
    assert (hollow[0].get_color(), hollow[0].get_marker()) == (filled.get_color(), filled.get_marker())
    assert hollow[0].get_xdata()[0] == filled.get_xdata()[0]
    assert legend_texts(figure) == ["CNN head", "AutoSAM", "the paper"]


def test_a_method_without_training_is_a_level_and_a_single_number_is_not_drawn():
    trained = [scores(CNN, p, labelled_patients=n) for n, p in ((0, 20), (1, 30))]
    figure = dice_figure(*trained, scores(BOX, 40, labelled_patients=0), scores(AUTOSAM, 50, labelled_patients=1))
    (axes,) = figure.axes
    (level,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert level.get_ydata() == pytest.approx([40, 40])
    assert sorted(legend_texts(figure)) == ["CNN head", "SAM (box)"]


def test_methods_can_be_told_apart():
    methods = [Method(f"m{number}", f"method {number}", "cnnhead_acdc") for number in range(13)]
    figure = dice_figure(*(scores(method, 50, labelled_patients=n) for method in methods for n in (1, 5)))
    lines = [bars.lines[0] for bars in figure.axes[0].containers]
    assert len({line.get_marker() for line in lines}) == 13
    assert len({line.get_xdata()[0] for line in lines}) == 13


def test_one_number_of_patients_draws_no_curve():
    assert dice_figure(scores(CNN, 30), scores(BOX, 40, labelled_patients=0)) is None


def measurements(method, *pairs, labelled_patients=1, quantities=("LV EF (%)", "RV EF (%)", "myocardial mass, ED (g)")):
    return pd.DataFrame(
        {
            "method": method.key,
            "title": method.title,
            "ablation": "",
            "value": "",
            "labelled_patients": labelled_patients,
            "split": 0,
            "patient": f"patient{number}",
            "quantity": quantity,
            "truth": float(truth),
            "predicted": float(predicted),
        }
        for number, (truth, predicted) in enumerate(pairs)
        for quantity in quantities
    )


def test_bland_altman_draws_errors_against_means_with_bias_and_limits():
    table = pd.concat(
        [
            measurements(CNN, (50, 52), (60, 64), (70, NAN)),
            measurements(BOX, (50, 90), labelled_patients=0),
            measurements(CNN, (50, 0), labelled_patients=5),
            measurements(CNN, (50, 0), quantities=("LV EDV (ml)",)),
        ]
    )
    rows = rows_of_panels(draw_bland_altman(table, labelled_patients=1))
    assert [row[0].get_ylabel() for row in rows] == ["LV EF (%)", "RV EF (%)", "myocardial mass,\nED (g)"]
    for row in rows:
        cnn, box = row
        assert cnn.collections[0].get_offsets().tolist() == [[51, 2], [62, 4]]
        assert box.collections[0].get_offsets().tolist() == [[70, 40]]
        limits = (3 - 1.96 * 2**0.5, 3 + 1.96 * 2**0.5)
        assert [line.get_ydata()[0] for line in cnn.lines] == pytest.approx([0, 3, *limits])
        assert cnn.get_title().endswith("+3.0 (+0.2 to +5.8), n = 2")
        assert box.get_title().endswith("+40.0, n = 1")
        assert cnn.get_ylim() == box.get_ylim()
        assert cnn.get_ylim()[0] < limits[0]
        assert cnn.get_ylim()[1] > 40
    assert [axes.get_title().splitlines()[0] for axes in rows[0]] == ["CNN head", "SAM (box)"]


def test_bland_altman_wraps_seven_methods_into_two_bands():
    methods = [Method(f"m{number}", f"method {number}", "cnnhead_acdc") for number in range(7)]
    figure = draw_bland_altman(pd.concat([measurements(m, (50, 52)) for m in methods]), labelled_patients=1)
    assert [len(row) for row in rows_of_panels(figure)] == [4, 4, 4, 3, 3, 3]


def test_bland_altman_of_a_method_without_any_ejection_fraction_says_so():
    table = pd.concat([measurements(CNN, (50, NAN), (60, NAN)), measurements(BOX, (50, 52), labelled_patients=0)])
    rows = rows_of_panels(draw_bland_altman(table, labelled_patients=1))
    assert rows[1][0].get_title() == "n = 0"
    assert draw_bland_altman(measurements(CNN, (50, 52)), labelled_patients=5) is None


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    def draw():
        return dice_figure(*(scores(CNN, 50, labelled_patients=n) for n in (1, 5)))

    figure = draw()
    written = save_figure(figure, tmp_path / "a.b")
    assert [path.name for path in written] == ["a.b.png", "a.b.svg"]
    contents = [path.read_bytes() for path in written]
    assert contents[0].startswith(b"\x89PNG")
    assert b"</svg>" in contents[1]
    for again in (figure, draw()):
        assert [path.read_bytes() for path in save_figure(again, tmp_path / "again")] == contents
    assert b"Software" not in contents[0]
    assert b"dc:date" not in contents[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.png", "a.b.svg", "again.png", "again.svg"]


def test_drawing_leaves_pyplot_alone(tmp_path):
    before = plt.get_fignums(), dict(plt.rcParams)
    save_figure(dice_figure(*(scores(CNN, 50, labelled_patients=n) for n in (1, 5))), tmp_path / "figure")
    assert (plt.get_fignums(), dict(plt.rcParams)) == before


SMALL = {"canvas_size": 64, "crop_size": 64, "image_size": 64}
LINEAR = Method("linear", "tiny encoder + linear head", "linearhead_acdc", knobs=SMALL)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    data = write_phantom_dataset(str(folder / "phantoms"), patients=4, size_hw_d=(64, 48, 3))
    vectors, groups = embed_slices(Cell(LINEAR, 0, 0), folder / "study", dataset_dir=data)
    return data, folder / "study/embeddings", vectors, groups


def test_every_slice_of_the_test_volumes_and_60_phantoms_are_embedded(embedded):
    data, cache, vectors, groups = embedded
    (patient,) = {case.partition("_frame")[0] for case in cases_of(data, 0)}
    assert groups == [patient] * 6 + [PHANTOMS] * 60  # ED and ES of one patient, three slices each
    assert vectors.shape == (66, 256)
    assert len(np.unique(vectors, axis=0)) == 66
    assert len([path for path in Path(cache).rglob("*") if path.is_file()]) >= 66


def test_embeddings_are_the_encoders_averaged_over_space(embedded):
    encoder = SamEncoder("phantom_unet", checkpoint=pretrained_file("phantom_unet.pth"), image_size=64).eval()
    images, _ = phantom_slices(60, seed=0, size=64, field_mm=384.0)
    expected = encoder(images[:2].repeat(1, 3, 1, 1)).mean(dim=(2, 3))
    # The cache stores embeddings in half precision.
    assert embedded[2][6:8] == pytest.approx(expected.numpy(), abs=2e-3 * float(expected.abs().max()))


def test_the_first_cell_with_a_frozen_encoder_is_embedded():
    unet = Method("unet", "UNet", "unet_acdc")
    along = Method("along", "trained along", "linearhead_acdc", knobs={"trainable_encoder": True})
    cells = [Cell(method, 1, 0) for method in (unet, along)]
    assert embedding_cell([*cells, Cell(BOX, 0, 0)]) is None
    varied = Cell(CNN, 1, 0, Variant("depth", "2"))
    assert embedding_cell([*cells, varied, Cell(LINEAR, 1, 0), Cell(CNN, 1, 0)]) == Cell(LINEAR, 1, 0)


def test_slices_are_embedded_as_the_trained_model_says(embedded, tmp_path):
    record = {"canvas_size": 64, "crop_size": 64, "image_size": 64}
    cell = Cell(replace(LINEAR, knobs={}), 1, 0)
    model = tmp_path / cell.name / "models/model.pt"
    model.parent.mkdir(parents=True)
    torch.save({"trained_with": encode_record(record)}, model)
    vectors, _ = embed_slices(cell, tmp_path, dataset_dir=embedded[0])
    assert vectors == pytest.approx(embedded[2], abs=1e-6)


def test_too_few_embeddings_are_not_drawn():
    assert draw_embeddings(np.zeros((6, 256), np.float32), ["case"] * 6) is None


def test_two_clusters_stay_apart_in_the_drawing():
    random = np.random.default_rng(0)
    centres = np.repeat([0.0, 50.0], 20)[:, None]
    figure = draw_embeddings(random.normal(size=(40, 8)) + centres, ["patient001"] * 20 + [PHANTOMS] * 20)
    one, other = (collection.get_offsets() for collection in figure.axes[0].collections)
    assert len(one) == len(other) == 20
    between = np.linalg.norm(one[:, None] - other[None], axis=-1)
    within = np.linalg.norm(one[:, None] - one[None], axis=-1) + 1e9 * np.eye(20)
    assert within.min(axis=1).max() < between.min()
    assert legend_texts(figure) == ["patient001", PHANTOMS]


def test_beyond_twelve_groups_the_smallest_are_drawn_together():
    groups = [f"patient{number:03d}" for number in range(14) for _ in range(1 if number < 4 else 3)] + [PHANTOMS] * 5
    vectors = np.random.default_rng(0).normal(size=(len(groups), 8))
    figure = draw_embeddings(vectors, groups)
    assert isinstance(figure, Figure)
    assert legend_texts(figure) == [*(f"patient{number:03d}" for number in range(4, 14)), "others", PHANTOMS]
    assert [len(collection.get_offsets()) for collection in figure.axes[0].collections] == [3] * 10 + [4, 5]
