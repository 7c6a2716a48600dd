import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import seeded

from components.phantom.anatomy import AnatomyRanges, anatomy, draw_anatomy
from components.phantom.appearance import AppearanceRanges, appearance, draw_appearance, signal
from components.phantom.dataset import MANIFEST, write_phantom_dataset
from components.phantom.draws import select
from components.phantom.tissues import TISSUE_LABELS, Tissue

RV, MYO, LV = 1, 2, 3
SMALL = {"size_hw": (128, 112), "spacing_mm": 3.0}

pytestmark = pytest.mark.usefixtures("one_thread")


def areas(labels):
    return torch.stack([(labels == label).sum((1, 2)) for label in range(4)], dim=1)


def subjects(count=8, seed=1, **ranges):
    return draw_anatomy(count, AnatomyRanges(**ranges), seeded(seed))


def test_a_slice_has_codes_labels_and_whole_grey_values():
    generator = seeded(0)
    body = draw_anatomy(3, AnatomyRanges(), generator)
    look = draw_appearance(3, AppearanceRanges(), generator)
    tissues, labels = anatomy(body, level=0.4, phase=0.0, size_hw=(96, 80), spacing_mm=4.0)
    image = appearance(tissues, look, generator)
    assert tissues.shape == labels.shape == image.shape == (3, 96, 80)
    assert tissues.dtype == labels.dtype == torch.uint8
    assert image.dtype == torch.float32
    assert labels.unique().tolist() == [0, 1, 2, 3]
    assert tissues.max() < len(Tissue)
    assert torch.equal(image, image.round())
    assert image.amin() == 0 and image.amax() == 255


def test_labels_are_a_function_of_tissues_and_papillary_muscles_belong_to_the_pool():
    tissues, labels = anatomy(subjects(), level=0.5, phase=0.0, **SMALL)
    assert torch.equal(labels, torch.tensor(TISSUE_LABELS, dtype=torch.uint8)[tissues.long()])
    assert TISSUE_LABELS[Tissue.LV_PAPILLARY] == LV
    assert (tissues == Tissue.LV_PAPILLARY).any()


def test_the_same_seed_gives_the_same_slices_and_another_seed_others():
    def render(seed):
        generator = seeded(seed)
        body = draw_anatomy(2, AnatomyRanges(), generator)
        look = draw_appearance(2, AppearanceRanges(), generator)
        tissues, _ = anatomy(body, level=0.3, phase=0.5, **SMALL)
        return appearance(tissues, look, generator)

    assert torch.equal(render(5), render(5))
    assert not torch.equal(render(5), render(6))


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    generator = seeded(0)
    tissues, _ = anatomy(draw_anatomy(1, AnatomyRanges(), generator), level=0.3, phase=0.0, **SMALL)
    appearance(tissues, draw_appearance(1, AppearanceRanges(), generator), generator)
    assert torch.equal(before, torch.get_rng_state())


def test_functions_leave_their_arguments_as_they_were():
    body = subjects(2)
    look = draw_appearance(2, AppearanceRanges(), seeded(0))
    kept = [{name: value.clone() for name, value in draw.items()} for draw in (body, look)]
    tissues, _ = anatomy(body, level=0.3, phase=0.0, **SMALL)
    kept_tissues = tissues.clone()
    appearance(tissues, look, seeded(0))
    assert torch.equal(tissues, kept_tissues)
    for draw, copy in zip((body, look), kept, strict=True):
        assert draw.keys() == copy.keys()
        assert all(torch.equal(draw[name], copy[name]) for name in draw)


def test_a_slice_does_not_depend_on_its_batch():
    body = subjects(4)
    _, together = anatomy(
        body, level=torch.tensor([0.1, 0.4, 0.6, 0.9]), phase=torch.tensor([0.0, 1.0, 0.0, 1.0]), **SMALL
    )
    _, alone = anatomy(select(body, torch.tensor([1])), level=0.4, phase=1.0, **SMALL)
    assert (together[1:2] != alone).float().mean() < 1e-3  # matrix products round differently for other batches


def test_systole_shrinks_both_pools_and_thickens_the_wall():
    body = subjects()
    _, diastole = anatomy(body, level=0.35, phase=0.0)
    _, systole = anatomy(body, level=0.35, phase=1.0)
    ed, es = areas(diastole), areas(systole)
    assert (es[:, LV] < 0.75 * ed[:, LV]).all()
    assert (es[:, RV] < ed[:, RV]).all()
    radius = {name: (area / torch.pi).sqrt() for name, area in (("ed", ed.float()), ("es", es.float()))}
    ring = {name: ((area[:, LV] + area[:, MYO]) / torch.pi).sqrt() for name, area in (("ed", ed), ("es", es))}
    assert (ring["es"] - radius["es"][:, LV] > ring["ed"] - radius["ed"][:, LV]).all()


def test_the_heart_shrinks_from_base_to_apex_and_the_right_ventricle_ends_first():
    body = subjects()
    sizes = torch.stack([areas(anatomy(body, level=level, phase=0.0)[1]) for level in (0.1, 0.5, 0.8, 0.97)])
    assert (sizes[:-1, :, LV] > sizes[1:, :, LV]).all()
    assert (sizes[:2, :, RV] > sizes[1:3, :, RV]).all()
    assert (sizes[3, :, RV] <= sizes[2, :, RV]).all()
    no_rv_but_myo = (sizes[..., RV] == 0) & (sizes[..., MYO] > 0)
    assert no_rv_but_myo[3].any()


@pytest.mark.parametrize("level", [-0.3, -0.01, 1.0, 1.01, 1.4])
def test_beyond_the_ventricles_there_is_no_label_but_a_body(level):
    tissues, labels = anatomy(subjects(16), level=level, phase=0.0)
    assert not labels.any()
    assert (tissues == Tissue.LIVER).any()
    assert (tissues == Tissue.GREAT_VESSEL).any()


def test_in_mid_slices_the_left_pool_touches_only_itself_and_the_wall():
    _, labels = anatomy(subjects(16), level=0.4, phase=0.0, size_hw=(256, 256), spacing_mm=1.5)
    pool = (labels == LV).float()[:, None]
    around = torch.nn.functional.max_pool2d(pool, 3, stride=1, padding=1)[:, 0] > pool[:, 0]
    assert around.any()
    assert (labels[around] == MYO).all()


def test_the_heart_has_the_size_its_ranges_ask_for():
    exact = {
        "lv_radius_mm": (25, 25),
        "lv_aspect": (1, 1),
        "scale": (1, 1),
        "warp_mm": (0, 0),
        "wall_roughness_mm": (0, 0),
    }
    _, labels = anatomy(subjects(4, **exact), level=0.0, phase=0.0, spacing_mm=1.0)
    assert areas(labels)[:, LV].tolist() == pytest.approx([torch.pi * 25**2] * 4, rel=0.02)
    _, coarse = anatomy(subjects(4, **exact), level=0.0, phase=0.0, size_hw=(128, 128), spacing_mm=2.0)
    assert areas(coarse)[:, LV].tolist() == pytest.approx([torch.pi * 25**2 / 4] * 4, rel=0.03)


def test_a_right_ventricle_of_no_chance_is_absent():
    _, labels = anatomy(subjects(rv_chance=(0, 0)), level=0.2, phase=0.0)
    counts = areas(labels)
    assert (counts[:, RV] == 0).all()
    assert (counts[:, LV] > 0).all()


def test_mirroring_puts_the_right_ventricle_on_the_other_side():
    def rv_minus_lv_columns(**ranges):
        _, labels = anatomy(subjects(**ranges), level=0.3, phase=0.0)
        columns = torch.arange(256.0)
        centre = [((labels == label) * columns).sum((1, 2)) / (labels == label).sum((1, 2)) for label in (RV, LV)]
        return centre[0] - centre[1]

    assert (rv_minus_lv_columns() < 0).all()
    assert (rv_minus_lv_columns(mirror_chance=(1, 1)) > 0).all()


def test_a_range_that_runs_backwards_is_refused():
    with pytest.raises(ValueError, match="lv_radius_mm"):
        subjects(lv_radius_mm=(30, 20))


def test_extreme_ranges_stay_finite_and_keep_their_labels():
    wide = AnatomyRanges(
        rotation_deg=(-180, 180),
        scale=(0.5, 1.8),
        mirror_chance=(0.5, 0.5),
        lv_radius_mm=(2, 45),
        wall_mm=(2, 20),
        lv_end_level=(0, 1),
        rv_end_level=(0, 1),
        lv_contraction=(0, 1),
    )
    generator = seeded(2)
    body = draw_anatomy(24, wide, generator)
    look = draw_appearance(24, AppearanceRanges(arbitrary_chance=(1, 1), noise=(0, 0.2)), generator)
    tissues, labels = anatomy(body, level=torch.linspace(-0.2, 1.2, 24), phase=torch.linspace(0, 1, 24), **SMALL)
    image = appearance(tissues, look, generator)
    assert image.isfinite().all()
    assert (areas(labels)[:, 1:].sum(0) > 0).all()


def test_tissues_have_the_order_of_cine_bssfp():
    generator = seeded(4)
    flat = AppearanceRanges(coil_log=(0, 0), bias_log=(0, 0), noise=(0, 0), blur_px=(0, 0), texture=(0, 0))
    tissues, _ = anatomy(draw_anatomy(6, AnatomyRanges(), generator), level=0.3, phase=0.0)
    image = signal(tissues, draw_appearance(6, flat, generator), generator)
    for slice_image, slice_tissues in zip(image, tissues, strict=True):
        mean = {
            tissue: slice_image[slice_tissues == tissue].mean() for tissue in (Tissue.LUNG, Tissue.MYO, Tissue.RV_POOL)
        }
        assert mean[Tissue.LUNG] < mean[Tissue.MYO] < mean[Tissue.RV_POOL] < 1.0
        assert slice_image[slice_tissues == Tissue.LV_POOL].unique().tolist() == [1.0]


def test_every_default_range_is_honoured():
    ranges = AnatomyRanges()
    body = draw_anatomy(64, ranges, seeded(9))
    for field in fields(ranges):
        if not field.name.endswith("_chance"):
            low, high = getattr(ranges, field.name)
            assert body[field.name].min() >= low and body[field.name].max() <= high
    fixed = draw_anatomy(4, replace(ranges, wall_mm=(9, 9)), seeded(9))
    assert fixed["wall_mm"].tolist() == [9.0] * 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "phantoms"
    assert write_phantom_dataset(str(root), patients=3, seed=7) == str(root)
    return root


def test_the_layout_is_the_release_s(dataset):
    folders = sorted(path.name for path in (dataset / "training").iterdir())
    assert folders == ["patient001", "patient002", "patient003"]
    for name in folders:
        folder = dataset / "training" / name
        info = dict(line.split(": ") for line in (folder / "Info.cfg").read_text().splitlines())
        assert list(info) == ["ED", "ES", "Group", "Height", "NbFrame", "Weight"]
        frames = [f"{name}_frame{int(info[phase]):02d}" for phase in ("ED", "ES")]
        expected = [f"{frame}{kind}.nii.gz" for frame in frames for kind in ("", "_gt")]
        assert sorted(path.name for path in folder.iterdir()) == sorted(["Info.cfg", *expected])
        assert int(info["ED"]) < int(info["ES"]) <= int(info["NbFrame"])
    assert "ED: 4\n" in (dataset / "training/patient002/Info.cfg").read_text()


def test_image_and_truth_share_an_oblique_grid_in_millimetres(dataset):
    truths = sorted(dataset.rglob("*_gt.nii.gz"))
    assert len(truths) == 6
    for path in truths:
        truth, image = nib.load(path), nib.load(str(path).replace("_gt", ""))
        assert image.shape == truth.shape
        assert np.array_equal(image.affine, truth.affine)
        assert image.get_data_dtype() == np.int16 and truth.get_data_dtype() == np.uint8
        right, down, thickness = image.header.get_zooms()
        assert right == down and 1.37 <= right <= 1.68 and thickness in (5, 10)
        assert nib.affines.voxel_sizes(image.affine) == pytest.approx([right, down, thickness], rel=1e-5)
        directions = image.affine[:3, :3] / [right, down, thickness]
        assert directions.T @ directions == pytest.approx(np.eye(3), abs=1e-5)
        assert np.abs(directions).max() < 0.99  # oblique
        assert image.get_qform(coded=True)[1] == image.get_sform(coded=True)[1] == 1
        assert image.get_qform() == pytest.approx(image.affine, abs=1e-3)
        assert set(np.unique(truth.dataobj)) == {0, RV, MYO, LV}
        assert np.asarray(image.dataobj).max() > 100


def test_both_frames_share_a_body_and_the_systolic_pool_is_smaller(dataset):
    for folder in (dataset / "training").iterdir():
        diastole, systole = (np.asarray(nib.load(path).dataobj) for path in sorted(folder.glob("*_gt.nii.gz")))
        assert (systole == LV).sum() < 0.8 * (diastole == LV).sum()
    assert any((np.asarray(nib.load(path).dataobj).max((0, 1)) == 0).any() for path in dataset.rglob("*_gt.nii.gz"))


def test_a_patient_does_not_depend_on_how_many_are_written(dataset, tmp_path):
    write_phantom_dataset(str(tmp_path / "one"), patients=1, seed=7)
    for path in (tmp_path / "one").rglob("*.nii.gz"):
        other = dataset / path.relative_to(tmp_path / "one")
        assert np.asarray(nib.load(path).dataobj).tobytes() == np.asarray(nib.load(other).dataobj).tobytes()


def test_the_same_call_reuses_the_folder_and_any_other_content_is_refused(tmp_path):
    root = tmp_path / "data"
    call = {"patients": 1, "seed": 1, "size_hw_d": (32, 24, 3)}
    write_phantom_dataset(str(root), **call)
    written = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    write_phantom_dataset(str(root), **call)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == written
    with pytest.raises(ValueError, match=r"seed.*2.*received.*seed.*1"):
        write_phantom_dataset(str(root), **{**call, "seed": 2})
    (root / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        write_phantom_dataset(str(root), **call)
    assert list(tmp_path.iterdir()) == [root]


def test_a_folder_of_someone_else_is_never_touched(tmp_path):
    (tmp_path / "data.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=MANIFEST):
        write_phantom_dataset(str(tmp_path), patients=1)
    assert [path.name for path in tmp_path.iterdir()] == ["data.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_phantom_dataset(str(tmp_path / "data"), patients=1, size_hw_d=(32, 24, 2))
    assert list(tmp_path.iterdir()) == []


def test_writers_of_the_same_folder_at_the_same_time_all_get_it_whole(tmp_path):
    root = str(tmp_path / "data")
    call = {"patients": 1, "seed": 3, "size_hw_d": (32, 24, 2)}
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: write_phantom_dataset(root, **call), range(3))) == [root] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert json.loads((tmp_path / "data" / MANIFEST).read_text())["arguments"]["seed"] == 3
    assert write_phantom_dataset(root, **call) == root


def test_the_size_can_be_asked_for_and_keeps_the_field_of_view(tmp_path):
    write_phantom_dataset(str(tmp_path / "large"), patients=1, size_hw_d=(512, 428, 2))
    image = nib.load(next((tmp_path / "large").rglob("*frame01.nii.gz")))
    assert image.shape == (512, 428, 2)
    assert 1.37 * 256 <= 512 * image.header.get_zooms()[0] <= 1.69 * 256


def test_the_series_holds_the_two_frames(tmp_path):
    write_phantom_dataset(str(tmp_path / "data"), patients=1, size_hw_d=(32, 32, 2), series=True)
    folder = tmp_path / "data/training/patient001"
    info = dict(line.split(": ") for line in (folder / "Info.cfg").read_text().splitlines())
    series = nib.load(folder / "patient001_4d.nii.gz")
    assert series.shape == (32, 32, 2, int(info["NbFrame"]))
    for phase in ("ED", "ES"):
        frame = nib.load(folder / f"patient001_frame{int(info[phase]):02d}.nii.gz")
        assert np.array_equal(series.dataobj[..., int(info[phase]) - 1], frame.dataobj)
    truth = nib.load(folder / "patient001_4d_gt.nii.gz")
    assert truth.shape == series.shape
    assert 60 / 90 <= series.header["pixdim"][4] * series.shape[-1] <= 60 / 50  # a heart beat in seconds


@pytest.mark.parametrize("call", [{"patients": 0}, {"seed": -1}, {"size_hw_d": (8, 32, 4)}, {"size_hw_d": (32, 32)}])
def test_arguments_out_of_range_are_refused(tmp_path, call):
    with pytest.raises(ValueError, match="Expected"):
        write_phantom_dataset(str(tmp_path / "data"), **call)
    assert list(tmp_path.iterdir()) == []
