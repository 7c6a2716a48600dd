"""DICOM studies through inference: the short-axis cine found among series, segmented like NIfTI, and written as SEG."""

import logging
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, messages_of
from monai.utils import OptionalImportError
from test_cine import segment
from test_function import GreyIsClass

from components.data.volume_search import find_volumes
from components.dicom import images
from components.dicom.segmentation_object import SaveDicomSegd
from components.dicom.stack import read_stack, read_voxels
from components.function.report import FunctionReport
from components.phantom.dataset import write_phantom_dataset

highdicom = pytest.importorskip("highdicom")
pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid  # noqa: E402

MR_IMAGE, ENHANCED_MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"
CLASSES = ("RV", "Myo", "LV")
STUDY, PLACE = generate_uid(), generate_uid()


@pytest.fixture(scope="module")
def beating(tmp_path_factory):
    """A beating phantom whose grey values are its labels, as a NIfTI image (x, y, z, t)."""
    root = tmp_path_factory.mktemp("phantom") / "data"
    write_phantom_dataset(str(root), patients=1, size_hw_d=(40, 32, 5), series=True)
    cine = nib.load(next(root.rglob("*_4d_gt.nii.gz")))
    voxels = np.asarray(cine.dataobj)[..., ::4].astype(np.int16)
    image = nib.Nifti1Image(voxels, cine.affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = 0.125
    return image


def dataset(
    sop_class, path, series, *, number=1, name="sax", study=STUDY, syntax=ExplicitVRLittleEndian, **attributes
) -> FileDataset:
    """A file's header, with what every image has."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, sop_class
    meta.MediaStorageSOPInstanceUID = generate_uid()
    is_implicit = syntax == ImplicitVRLittleEndian
    made = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128), is_implicit_VR=is_implicit)
    made.SOPClassUID, made.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    made.StudyInstanceUID, made.SeriesInstanceUID, made.FrameOfReferenceUID = study, series, PLACE
    made.Modality, made.SeriesNumber, made.SeriesDescription = "MR", number, name
    made.PatientID, made.PatientName = "P1", "Phantom"
    made.PatientSize, made.PatientWeight = 1.8, 80
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    return made


def geometry(affine, depth):
    """Position, orientation and pixel spacing of a slice in DICOM's LPS, from a NIfTI affine in RAS."""
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :2], axis=0)
    directions = lps[:3, :2] / spacing
    position = lps[:3, 3] + depth * lps[:3, 2]
    decimals = [pydicom.valuerep.format_number_as_ds(float(value)) for value in [*position, *directions.T.ravel()]]
    return decimals[:3], decimals[3:], [f"{spacing[1]:.6g}", f"{spacing[0]:.6g}"]


def save(made, pixels, path):
    made.Rows, made.Columns = pixels.shape[-2:]
    made.PixelData = np.ascontiguousarray(pixels.astype(np.uint16)).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path)


def write_classic(
    folder, image, *, one_series=False, depths=None, number=1, name="sax", affine=None, trigger=True, **kw
):
    """Write a file for each slice and frame, under names that tell no order."""
    voxels, random = np.asarray(image.dataobj), np.random.default_rng(number)
    affine = image.affine if affine is None else affine
    series = generate_uid()
    for depth in range(voxels.shape[2]) if depths is None else depths:
        series = series if one_series else generate_uid()
        for frame in range(voxels.shape[3]):
            path = folder / f"IM{random.integers(10**9):09d}"
            made = dataset(MR_IMAGE, path, series, number=number if one_series else number + depth, name=name, **kw)
            made.ImagePositionPatient, made.ImageOrientationPatient, made.PixelSpacing = geometry(affine, depth)
            made.InstanceNumber = 1 + frame if trigger is not None else 1
            if trigger:
                made.TriggerTime = 125 * frame
                made.InstanceNumber = int(random.integers(1000))
            save(made, voxels[:, :, min(depth, voxels.shape[2] - 1), frame].T, path)


def write_enhanced(folder, image, **kw):
    """Write all slices and frames as one file, the last frame first."""
    voxels = np.asarray(image.dataobj)
    made = dataset(ENHANCED_MR_IMAGE, folder / "enhanced.dcm", generate_uid(), **kw)
    pixels, groups = [], []
    for frame in reversed(range(voxels.shape[3])):
        for depth in range(voxels.shape[2]):
            position, orientation, spacing = geometry(image.affine, depth)
            item = Dataset()
            for sequence, values in {
                "PlanePositionSequence": {"ImagePositionPatient": position},
                "PlaneOrientationSequence": {"ImageOrientationPatient": orientation},
                "PixelMeasuresSequence": {"PixelSpacing": spacing, "SliceThickness": 8},
                "CardiacSynchronizationSequence": {"NominalCardiacTriggerDelayTime": 125.0 * frame},
                "PixelValueTransformationSequence": {"RescaleSlope": 2, "RescaleIntercept": -1},
            }.items():
                content = Dataset()
                for attribute, value in values.items():
                    setattr(content, attribute, value)
                setattr(item, sequence, [content])
            groups.append(item)
            pixels.append(voxels[:, :, depth, frame].T)
    made.NumberOfFrames, made.SharedFunctionalGroupsSequence = len(pixels), [Dataset()]
    made.PerFrameFunctionalGroupsSequence = groups
    save(made, np.stack(pixels), folder / "enhanced.dcm")


def write_others(folder, image, **kw):
    """Write what else a study holds: a long axis, a localiser, a report, notes."""
    long_axis = image.affine[:, [2, 0, 1, 3]]
    write_classic(folder / "lax", image, one_series=True, depths=[0], number=50, name="4ch", affine=long_axis, **kw)
    still = nib.Nifti1Image(np.asarray(image.dataobj)[..., :1], image.affine)
    localiser = np.diag([-2.0, -2.0, 10.0, 1.0])
    write_classic(
        folder / "loc", still, one_series=True, number=60, name="localiser", affine=localiser, trigger=None, **kw
    )
    report = dataset("1.2.840.10008.5.1.4.1.1.88.11", folder / "report.dcm", generate_uid(), **kw)
    report.save_as(folder / "report.dcm")
    (folder / "notes.txt").write_text("no image")


WAYS = {
    "a series a slice": write_classic,
    "one series": lambda folder, image: write_classic(folder, image, one_series=True),
    "ordered by number": lambda folder, image: write_classic(folder, image, trigger=False),
    "enhanced": write_enhanced,
}


def on_grid_of(image, reference):
    """The voxels of an image in the order of another one's axes, which lie at the same places."""
    to_image = np.linalg.inv(image.affine) @ reference.affine
    assert np.abs(to_image[:3, :3]).round(3).max(axis=0).tolist() == [1, 1, 1]
    index = np.stack(np.meshgrid(*map(np.arange, reference.shape[:3]), indexing="ij"), axis=-1)
    places = index @ to_image[:3, :3].T + to_image[:3, 3]
    assert np.abs(places - places.round()).max() < 1e-2
    return np.asarray(image.dataobj)[tuple(np.moveaxis(places.round().astype(int), -1, 0))]


@pytest.mark.parametrize("way", WAYS)
def test_a_study_has_the_labels_of_its_nifti_file_and_segs_that_read_back_voxel_for_voxel(way, beating, tmp_path):
    study = tmp_path / "in" / "P1"
    WAYS[way](study / "series", beating)
    write_others(study, beating)
    nib.save(beating, tmp_path / "cine.nii.gz")
    saving = [SaveDicomSegd("pred", str(tmp_path / "out"), CLASSES)]
    network = GreyIsClass() if way != "enhanced" else HalvedGreyIsClass()
    handlers = [FunctionReport(str(tmp_path / "out"))]
    segment(study, tmp_path / "out", network=network, smoothing=0, saving=saving, handlers=handlers)
    segment(tmp_path / "cine.nii.gz", tmp_path / "out", network=GreyIsClass(), smoothing=0)
    of_dicom, of_nifti = (nib.load(tmp_path / f"out/{name}_pred.nii.gz") for name in ("P1", "cine"))
    assert np.array_equal(on_grid_of(of_dicom, of_nifti), np.asarray(of_nifti.dataobj))
    assert np.array_equal(np.asarray(of_nifti.dataobj), np.asarray(beating.dataobj))
    assert len(np.unique(of_nifti.dataobj)) == 4
    known = way != "ordered by number"
    assert of_dicom.header["pixdim"][4] == (np.float32(0.125) if known else 1)
    (row,) = pd.read_csv(tmp_path / "out/function.csv").to_dict("records")
    assert row["body_surface_m2"] == 2
    assert_reads_back(tmp_path / "out/P1_seg", study, np.asarray(of_dicom.dataobj))


class HalvedGreyIsClass(GreyIsClass):
    """The same for grey values that a file rescales by 2 x - 1."""

    def forward(self, images):
        return super().forward((images + 1) / 2)


def assert_reads_back(folder, study, labels):
    """Every SEG has the voxels of its frame, in place and by the instances that it refers to."""
    stack = read_stack(study)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"frame{n:02d}.dcm" for n in range(1, labels.shape[3] + 1)]
    series = set()
    for frame, file in enumerate(files):
        seg = highdicom.seg.segread(file)
        series.add(seg.SeriesInstanceUID)
        assert (seg.StudyInstanceUID, seg.FrameOfReferenceUID, seg.InstanceNumber) == (STUDY, PLACE, frame + 1)
        described = [seg.get_segment_description(number) for number in (1, 2, 3)]
        assert [str(segment.segment_label) for segment in described] == list(CLASSES)
        codes = [segment.segmented_property_type.value for segment in described]
        assert codes == ["53085002", "49848007", "87878005"]
        images = [of_slice[frame] for of_slice in stack.slices]
        if images[0].frame is None:
            read = seg.get_pixels_by_source_instance(
                [image.instance_uid for image in images], combine_segments=True, assert_missing_frames_are_empty=True
            )
        else:
            read = seg.get_pixels_by_source_frame(
                images[0].instance_uid,
                [image.frame + 1 for image in images],
                combine_segments=True,
                assert_missing_frames_are_empty=True,
            )
        assert np.array_equal(read.transpose(2, 1, 0), labels[..., frame])
        referenced = {str(item.SeriesInstanceUID) for item in seg.ReferencedSeriesSequence}
        assert referenced == {image.series for image in images}
    assert len(series) == 1


def refused(folder) -> str:
    """Why a study is refused, as inference says it."""
    with pytest.raises(Exception) as error:
        segment(folder, folder.parent / "out", network=GreyIsClass())
    return messages_of(error.value)


def test_a_study_of_long_axes_and_localisers_is_refused_with_what_it_holds(beating, tmp_path):
    write_others(tmp_path / "study", beating)
    message = refused(tmp_path / "study")
    frames = beating.shape[3]
    assert "study has no short-axis cine: expected at least 4 parallel slices of several frames each" in message
    assert f"'4ch': 1 slice of {frames} frames" in message
    assert "'localiser': 5 slices of 1 frame, across a body axis" in message


def test_a_stack_across_the_body_is_no_short_axis(beating, tmp_path):
    write_classic(tmp_path / "study", beating, affine=np.diag([-1.5, -1.5, 8.0, 1.0]))
    assert f"found 'sax': 5 slices of {beating.shape[3]} frames, across a body axis" in refused(tmp_path / "study")


def test_missing_slices_are_named_by_the_positions_beside_the_gap(beating, tmp_path):
    write_classic(tmp_path / "study", beating, depths=[0, 1, 2, 4, 5])
    step = float(np.linalg.norm(beating.affine[:3, 2]))
    message = refused(tmp_path / "study")
    assert f"expected one every {step:.1f} mm, none is between" in message
    assert "positions in mm: " in message


def test_uneven_gaps_are_refused_with_the_positions(beating, tmp_path):
    write_classic(tmp_path / "study", beating, depths=[0, 1, 2, 3])
    moved = beating.affine.copy()
    moved[:3, 3] += 4.3 * moved[:3, 2]
    write_classic(tmp_path / "study", beating, depths=[0], number=9, affine=moved)
    message = refused(tmp_path / "study")
    assert "has unevenly spaced slices" in message
    assert "positions in mm: " in message


def test_slices_of_different_numbers_of_frames_are_refused(beating, tmp_path):
    write_classic(tmp_path / "study", beating)
    next((tmp_path / "study").iterdir()).unlink()
    frames = beating.shape[3]
    message = refused(tmp_path / "study")
    assert "expected as many frames in every slice" in message
    assert message.count(f"{frames} at ") >= 4
    assert f"{frames - 1} at " in message


def test_slices_that_do_not_lie_above_each_other_are_refused(beating, tmp_path):
    write_classic(tmp_path / "study", beating, depths=[0, 1, 3, 4])
    moved = beating.affine.copy()
    moved[:3, 3] += 20 * moved[:3, 0] / np.linalg.norm(moved[:3, 0])
    write_classic(tmp_path / "study", beating, depths=[2], number=9, affine=moved)
    assert "are not in line: their first pixels are up to 20.0 mm beside a line" in refused(tmp_path / "study")


def test_the_later_one_of_two_breath_holds_counts_and_phase_images_do_not(beating, tmp_path):
    write_classic(tmp_path / "study", beating)
    moved = nib.Nifti1Image(np.full(beating.shape, 7, np.int16), beating.affine)
    write_classic(tmp_path / "study", moved, depths=[2], number=100, name="sax again")
    write_classic(tmp_path / "study", moved, number=200, name="flow")
    for path in (tmp_path / "study").iterdir():
        header = pydicom.dcmread(path)
        if header.SeriesDescription == "flow":
            header.ImageType = ["ORIGINAL", "PRIMARY", "P"]
            header.save_as(path)
    stack = read_stack(tmp_path / "study")
    is_seven = (read_voxels(stack) == 7).all((0, 1, 3))
    assert is_seven.sum() == 1
    assert stack.left_out == {
        "series 3 'sax'": "another breath-hold of a slice: the latest one with the usual number of frames is used",
        **{
            f"series {number} 'flow'": "DICOM images of phase or one part of complex values: expected magnitudes"
            for number in range(200, 205)
        },
    }


def shifted(image, slices):
    """The affine of an image that lies a number of slices farther along their normal."""
    affine = image.affine.copy()
    affine[:3, 3] += slices * affine[:3, 2]
    return affine


def sevens(image, frames=None):
    """An image of one grey value that no label has."""
    shape = (*image.shape[:3], frames or image.shape[3])
    return nib.Nifti1Image(np.full(shape, 7, np.int16), image.affine)


OF_ANOTHER_KIND = {
    "name": {"name": "sax_tagging_b2"},
    "sequence": {"name": "sax", "ScanningSequence": ["GR", "IR"]},
    "sequence name": {"name": "sax", "SequenceName": "*fl2d1_tag"},
    "type of image": {"name": "sax", "ImageType": ["DERIVED", "PRIMARY", "T1 MAP"]},
}


@pytest.mark.parametrize(("kind", "depths"), [*((kind, [1, 3]) for kind in OF_ANOTHER_KIND), ("name", range(5))])
def test_later_series_of_another_kind_replace_no_slice(kind, depths, beating, tmp_path):
    write_classic(tmp_path / "study", beating, SequenceName="*tfi2d1_15")
    others = {"SequenceName": "*tfi2d1_15", **OF_ANOTHER_KIND[kind]}
    write_classic(tmp_path / "study", sevens(beating), depths=depths, number=40, **others)
    stack = read_stack(tmp_path / "study")
    assert stack.shape == beating.shape
    assert not (read_voxels(stack) == 7).any()
    assert stack.chosen == f"'sax': 5 slices of {beating.shape[3]} frames"
    assert set(stack.left_out) == {f"series {40 + depth} '{others['name']}'" for depth in depths}
    assert set(stack.left_out.values()) == {
        "at slices of the short-axis cine, but of another name, sequence or number of frames"
    }


TAGGED = {
    "protocol": {"ProtocolName": "SAX_TAG"},
    "name of the sequence": {"SequenceName": "*fl2d1_tag"},
    "variant of the sequence": {"SequenceVariant": ["SP", "MP"]},
    "attribute": {"Tagging": "GRID"},
}


@pytest.mark.parametrize("way", TAGGED)
def test_a_later_whole_stack_of_tagging_under_a_plain_name_is_not_taken(way, beating, tmp_path):
    common = {"SequenceVariant": ["SK", "SP"], "ProtocolName": "SAX", "one_series": True}
    write_classic(tmp_path / "study", beating, name="sax", **common)
    write_classic(tmp_path / "study", sevens(beating), name="sax", number=40, **common | TAGGED[way])
    stack = read_stack(tmp_path / "study")
    assert stack.shape == beating.shape
    assert not (read_voxels(stack) == 7).any()
    assert stack.chosen == f"'sax': 5 slices of {beating.shape[3]} frames"


def test_the_choice_between_two_whole_stacks_that_nothing_tells_apart_is_named(beating, tmp_path):
    write_classic(tmp_path / "study", beating, one_series=True)
    write_classic(tmp_path / "study", sevens(beating), one_series=True, number=40)
    stack = read_stack(tmp_path / "study")
    assert (read_voxels(stack) == 7).all()
    of_each = f"'sax': 5 slices of {beating.shape[3]} frames in series"
    assert stack.chosen.startswith(f"{of_each} 40, and not {of_each} 1; give the study without the wrong one")


@pytest.mark.parametrize("name", ["LGE_SAX", "sax", ""])
@pytest.mark.parametrize("place", ["at the slices", "between them"])
def test_still_images_of_the_same_geometry_are_no_slices_of_the_cine(name, place, beating, tmp_path):
    write_classic(tmp_path / "study", beating, name="" if name == "" else "sax")
    still = sevens(beating, frames=1)
    if place == "between them":
        write_classic(tmp_path / "study", still, depths=[0], number=40, name=name, affine=shifted(beating, 1.5))
    else:
        write_classic(tmp_path / "study", still, number=40, name=name)
    stack = read_stack(tmp_path / "study")
    assert stack.shape == beating.shape
    assert not (read_voxels(stack) == 7).any()


def test_a_still_image_in_place_of_a_slice_of_its_name_is_a_slice_that_lost_frames(beating, tmp_path):
    write_classic(tmp_path / "study", beating, depths=[0, 1, 2, 3])
    write_classic(tmp_path / "study", sevens(beating, frames=1), depths=[4], number=9)
    message = refused(tmp_path / "study")
    assert "expected as many frames in every slice" in message
    assert "1 at " in message


def test_a_breath_hold_that_was_broken_off_does_not_replace_a_whole_one(beating, tmp_path):
    write_classic(tmp_path / "study", beating)
    write_classic(tmp_path / "study", sevens(beating, frames=3), depths=[2], number=100)
    stack = read_stack(tmp_path / "study")
    assert not (read_voxels(stack) == 7).any()
    assert list(stack.left_out) == ["series 102 'sax'"]


def test_slices_of_other_names_complete_the_stack_unless_they_are_no_plain_cine(beating, tmp_path):
    write_classic(tmp_path / "named/study", beating, depths=[0, 1], name="upper heart")
    write_classic(tmp_path / "named/study", beating, depths=[2, 3, 4], number=20, name="lower heart")
    stack = read_stack(tmp_path / "named/study")
    assert stack.shape == beating.shape
    assert stack.chosen.startswith("'lower heart', 'upper heart': 5 slices of")
    write_classic(tmp_path / "tagged/study", beating, depths=[0, 1, 3, 4])
    write_classic(tmp_path / "tagged/study", sevens(beating), depths=[2], number=40, name="sax_tag")
    assert "none is between" in refused(tmp_path / "tagged/study")


def test_the_log_says_which_series_are_read_and_why_others_are_not(beating, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_classic(tmp_path / "in/anna", beating)
    write_classic(tmp_path / "in/anna", sevens(beating), depths=[1], number=40, name="sax_tag")
    segment(tmp_path / "in", tmp_path / "out", network=GreyIsClass())
    assert f"in: the short-axis cine is 'sax': 5 slices of {beating.shape[3]} frames" in caplog.text
    assert (
        "skipped 1, at slices of the short-axis cine, but of another name, sequence or number of frames: "
        "in, series 41 'sax_tag'"
    ) in caplog.text


def files_at(folder, depth):
    """The files of a slice, by the number of its series."""
    return [
        path for path in sorted(folder.iterdir()) if pydicom.dcmread(path, force=True).get("SeriesNumber") == 1 + depth
    ]


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (0, "a damaged DICOM file, empty: copy it again from its source"),
        (100, "a damaged DICOM file, not DICOM by its content: copy it again from its source"),
        (420, "a damaged DICOM file, cut off before its pixels end: copy it again from its source"),
        (-100, "a damaged DICOM file, cut off before its pixels end: copy it again from its source"),
    ],
)
@pytest.mark.parametrize("depth", [2, 4])
def test_a_stack_that_may_lack_slices_or_frames_by_damage_is_refused_with_the_files(
    depth, kept, reason, beating, tmp_path
):
    write_classic(tmp_path / "study", beating)
    lost = files_at(tmp_path / "study", depth)
    for number, path in enumerate(lost):
        content = path.read_bytes()
        path.unlink()
        path.with_name(f"cut{number:02d}.dcm").write_bytes(content[:kept])
    message = refused(tmp_path / "study")
    assert "study: expected every file of the short-axis cine whole, but 'sax': " in message
    named = ", ".join(f"cut{number:02d}.dcm" for number in range(5))
    assert len(lost) == 5
    assert f"may lack slices or frames: {named}: {reason}; or remove what is of another series" in message


def test_an_empty_file_without_a_suffix_is_damaged_beside_dicom_files(beating, tmp_path):
    write_classic(tmp_path / "study", beating)
    (tmp_path / "study/README").write_bytes(b"")
    (tmp_path / "study/._IM0001.dcm").write_bytes(b"of macOS")
    assert read_stack(tmp_path / "study").shape == beating.shape
    path = files_at(tmp_path / "study", 4)[0]
    path.write_bytes(b"")
    assert f"may lack slices or frames: {path.name}: a damaged DICOM file, empty" in refused(tmp_path / "study")


def test_damaged_files_of_other_series_are_named_and_stop_nothing(beating, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_classic(tmp_path / "in/anna/sax", beating)
    write_others(tmp_path / "in/anna", beating)
    localiser = sorted((tmp_path / "in/anna/loc").iterdir())[0]
    localiser.write_bytes(localiser.read_bytes()[:-100])
    copied = sorted((tmp_path / "in/anna/sax").iterdir())[0]
    copied.with_suffix(".dcm").write_bytes(copied.read_bytes()[:420])  # the file is there a second time, whole
    (tmp_path / "in/berta").mkdir()
    (tmp_path / "in/berta/x.dcm").write_bytes(b"")
    segment(tmp_path / "in", tmp_path / "out", network=GreyIsClass())
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["anna_pred.nii.gz"]
    assert (
        "skipped 2, a damaged DICOM file, cut off before its pixels end: copy it again from its source: "
        f"anna, file loc/{localiser.name}, anna, file sax/{copied.name}.dcm"
    ) in caplog.text
    assert "skipped 1, a damaged DICOM file, empty: copy it again from its source: berta/x.dcm" in caplog.text


def cut_off(paths):
    """End files before their pixels."""
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[: content.index(b"\xe0\x7f\x10\0") - 20])


def test_a_localiser_of_damaged_files_only_is_left_out_with_the_reason(beating, tmp_path):
    write_classic(tmp_path / "study", beating)
    write_others(tmp_path / "study", beating)
    localiser = sorted((tmp_path / "study/loc").iterdir())
    cut_off(localiser)
    stack = read_stack(tmp_path / "study")
    assert stack.shape == beating.shape
    reasons = {stack.left_out[f"file loc/{path.name}"] for path in localiser}
    assert reasons == {"a damaged DICOM file, cut off before its pixels end: copy it again from its source"}


@pytest.mark.parametrize("one_series", [True, False])
def test_a_damaged_series_at_the_axes_of_the_cine_may_be_of_it_unless_the_cine_is_one_series(
    one_series, beating, tmp_path
):
    write_classic(tmp_path / "study", beating, one_series=one_series)
    write_classic(tmp_path / "study", beating, depths=[5], number=40)
    lost = files_at(tmp_path / "study", 39 + 5)
    cut_off(lost)
    if one_series:
        stack = read_stack(tmp_path / "study")
        assert stack.shape == beating.shape
        assert set(stack.left_out) == {f"file {path.name}" for path in lost}
    else:
        assert f"may lack slices or frames: {lost[0].name}" in refused(tmp_path / "study")


def test_a_damaged_phase_image_does_not_stop_the_study(beating, tmp_path):
    write_classic(tmp_path / "study", beating)
    write_classic(
        tmp_path / "study", beating, depths=[0], number=40, name="flow", ImageType=["ORIGINAL", "PRIMARY", "P"]
    )
    paths = files_at(tmp_path / "study", 39)
    for path in paths:
        path.write_bytes(path.read_bytes()[:-100])
    stack = read_stack(tmp_path / "study")
    assert stack.shape == beating.shape
    assert set(stack.left_out) == {f"file {path.name}" for path in paths}


def test_a_folder_of_damaged_files_only_says_so(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.dcm").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"no volume found .* left out: 0\.dcm and 2 more: a damaged DICOM file, empty"
    ):
        find_volumes(str(tmp_path))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_files_without_the_preamble_are_read(syntax, beating, tmp_path):
    write_classic(tmp_path / "study", beating, syntax=syntax)
    whole = read_voxels(read_stack(tmp_path / "study"))
    for path in (tmp_path / "study").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[content.index(b"\x08\0\x16\0") :])  # from the class of the image on
    saving = [SaveDicomSegd("pred", str(tmp_path / "out"), CLASSES)]
    segment(tmp_path / "study", tmp_path / "out", network=GreyIsClass(), smoothing=0, saving=saving)
    assert np.array_equal(read_voxels(read_stack(tmp_path / "study")), whole)
    assert_reads_back(
        tmp_path / "out/study_seg", tmp_path / "study", np.asarray(nib.load(tmp_path / "out/study_pred.nii.gz").dataobj)
    )


def test_images_without_a_study_are_named_with_the_reason(beating, tmp_path):
    write_classic(tmp_path / "in/anna", beating)
    write_classic(tmp_path / "in/berta", beating, depths=[0])
    for path in (tmp_path / "in/berta").iterdir():
        header = pydicom.dcmread(path)
        del header.StudyInstanceUID
        header.save_as(path)
    found = find_volumes(str(tmp_path / "in"))
    assert {item["image"] for item in found} == {str(tmp_path / "in/anna")}
    assert len(found.skipped) == beating.shape[3]
    assert all(path.startswith("berta/") for path in found.skipped)
    assert set(found.skipped.values()) == {
        "DICOM images without StudyInstanceUID, which an anonymiser may have removed: give the images of each study "
        "one of their own"
    }
    with pytest.raises(ValueError, match="and 4 more: DICOM images without StudyInstanceUID"):
        find_volumes(str(tmp_path / "in/berta"))


def test_images_that_no_cine_can_be_of_are_named_with_the_reason(beating, tmp_path):
    write_classic(tmp_path / "in", beating)
    write_classic(tmp_path / "in", beating, depths=[0], number=30, name="echo", Modality="US")
    write_classic(tmp_path / "in", beating, depths=[0], number=31, name="map", PhotometricInterpretation="RGB")
    write_classic(tmp_path / "in", beating, depths=[0], number=32, name="no place")
    for path in files_at(tmp_path / "in", 31):
        header = pydicom.dcmread(path)
        del header.ImagePositionPatient
        header.save_as(path)
    skipped = find_volumes(str(tmp_path / "in")).skipped
    assert skipped["in, series 30 'echo'"] == "DICOM of the modality US: expected MR or CT"
    assert skipped["in, series 31 'map'"] == "DICOM images of colours: expected grey values"
    assert skipped["in, series 32 'no place'"].startswith("DICOM images without a place: expected ImagePositionPatient")


def test_copies_of_an_image_count_once(beating, tmp_path):
    write_classic(tmp_path / "study/a", beating)
    (tmp_path / "study/b").mkdir()
    for path in sorted((tmp_path / "study/a").iterdir())[::2]:
        (tmp_path / "study/b" / path.name).write_bytes(path.read_bytes())
    stack = read_stack(tmp_path / "study")
    assert stack.shape == beating.shape
    assert set(stack.left_out.values()) == {"a copy of a DICOM image that is read"}
    assert all(name.startswith("file b/") for name in stack.left_out)


def test_images_that_an_anonymiser_gave_one_uid_stay_apart(beating, tmp_path):
    write_classic(tmp_path / "study", beating, SOPInstanceUID="1.2.3")
    assert read_stack(tmp_path / "study").shape == beating.shape


@pytest.mark.parametrize(
    "inverted",
    [
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PresentationLUTShape": "INVERSE"},
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    ],
)
def test_images_whose_smallest_value_is_white_are_inverted_once(inverted, beating, tmp_path):
    write_classic(tmp_path / "plain", beating)
    voxels = np.asarray(beating.dataobj)
    write_classic(tmp_path / "inverted", nib.Nifti1Image(3 - voxels, beating.affine), **inverted)
    plain, turned = (read_voxels(read_stack(tmp_path / name)) for name in ("plain", "inverted"))
    assert np.array_equal(turned, plain)


def test_inverted_slices_are_inverted_from_one_value(beating, tmp_path):
    voxels = np.asarray(beating.dataobj).copy()
    voxels[:, :, 2] //= 2
    write_classic(tmp_path / "plain", nib.Nifti1Image(voxels, beating.affine))
    inverted = nib.Nifti1Image(3 - voxels, beating.affine)
    write_classic(tmp_path / "inverted", inverted, PhotometricInterpretation="MONOCHROME1", RescaleSlope=2)
    plain, turned = (read_voxels(read_stack(tmp_path / name)) for name in ("plain", "inverted"))
    assert np.array_equal(turned, 2 * plain)


def test_a_study_that_holds_its_own_results_is_segmented_as_before(beating, tmp_path):
    write_classic(tmp_path / "study", beating, one_series=True)
    saving = [SaveDicomSegd("pred", str(tmp_path / "study/out"), CLASSES)]
    labels = []
    for _ in range(2):
        segment(tmp_path / "study", tmp_path / "study/out", network=GreyIsClass(), smoothing=0, saving=saving)
        labels.append(np.asarray(nib.load(tmp_path / "study/out/study_pred.nii.gz").dataobj))
    assert np.array_equal(*labels)
    assert read_stack(tmp_path / "study").shape == labels[0].shape


def test_studies_are_cases_by_their_folders_and_one_that_fails_stops_none(beating, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_classic(tmp_path / "in/anna/IMAGES", beating)
    other = generate_uid()
    write_classic(tmp_path / "in/berta/a/IMAGES", beating, study=other)
    write_others(tmp_path / "in/berta", beating, study=other)
    write_classic(tmp_path / "in/clara", beating, depths=[0], study=generate_uid())
    with pytest.raises(RuntimeError, match=r"1 of 3 volumes failed: .*clara has no short-axis cine"):
        segment(tmp_path / "in", tmp_path / "out", network=GreyIsClass())
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == [
        "anna_pred.nii.gz",
        "berta_pred.nii.gz",
    ]
    assert "not of the short-axis cine: berta, series 50 '4ch', berta, series 60 'localiser'" in caplog.text


def test_studies_of_one_folder_name_have_results_of_their_own(beating, tmp_path):
    for patient in ("anna", "berta"):
        write_classic(tmp_path / "in" / patient / "cardiac", beating, study=generate_uid())
        (tmp_path / "in" / patient / "other").mkdir()
        write_classic(tmp_path / "in" / patient / "other", beating, depths=[0], study=generate_uid())
    saving = [SaveDicomSegd("pred", str(tmp_path / "out"), CLASSES)]
    with pytest.raises(RuntimeError, match="2 of 4 volumes failed"):
        segment(tmp_path / "in", tmp_path / "out", network=GreyIsClass(), smoothing=0, saving=saving)
    names = {"anna_cardiac", "berta_cardiac"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{name}_{end}" for name in names for end in ("pred.nii.gz", "seg")
    }


def test_studies_in_one_folder_are_refused(beating, tmp_path):
    write_classic(tmp_path / "in", beating, depths=[0])
    write_classic(tmp_path / "in", beating, depths=[0], number=2, study=generate_uid())
    with pytest.raises(ValueError, match="in holds 2 DICOM studies: expected each one in a folder of its own"):
        find_volumes(str(tmp_path / "in"))


def test_dicom_beside_volumes_is_left_out_with_the_reason(beating, tmp_path):
    write_classic(tmp_path / "in/raw", beating, depths=[0])
    grey = np.arange(np.prod(beating.shape), dtype=np.int16).reshape(beating.shape)  # not taken for a label map
    nib.save(nib.Nifti1Image(grey, beating.affine), tmp_path / "in/cine.nii.gz")
    found = find_volumes(str(tmp_path / "in"))
    assert {Path(item["image"]).name for item in found} == {"cine.nii.gz"}
    assert found.skipped == {"raw": "DICOM files beside volumes: give this folder alone to segment them"}


def test_without_pydicom_the_error_says_what_to_install(beating, tmp_path, monkeypatch):
    write_classic(tmp_path / "in", beating, depths=[0])
    monkeypatch.setattr(images, "HAS_PYDICOM", False)
    with pytest.raises(OptionalImportError, match="pip install pydicom highdicom"):
        find_volumes(str(tmp_path / "in"))


def test_a_bundle_measures_a_study_like_its_nifti_file(tmp_path):
    write_phantom_dataset(str(tmp_path / "data"), patients=1, size_hw_d=(64, 56, 4))
    frames = [nib.load(path) for path in sorted((tmp_path / "data/training/patient001").glob("*_frame??.nii.gz"))]
    cine = nib.Nifti1Image(np.stack([frame.dataobj for frame in frames], axis=-1), frames[0].affine)
    nib.save(cine, tmp_path / "cine.nii.gz")
    write_classic(tmp_path / "study", cine)
    configs = REPOSITORY / "bundles/linearhead_acdc/configs"
    for name in ("cine.nii.gz", "study"):
        monai.bundle.run(
            "measuring",
            config_file=[str(configs / f"{config}.json") for config in ("inference", "function")],
            logging_file=False,
            dataset_dir=str(tmp_path / name),
            output_dir=str(tmp_path / "out" / name[:4]),
            test_time_views=1,
        )
    of_nifti, of_dicom = (
        nib.load(tmp_path / "out" / name) for name in ("cine/cine_pred.nii.gz", "stud/study_pred.nii.gz")
    )
    assert len(np.unique(of_nifti.dataobj)) == 4
    assert np.array_equal(on_grid_of(of_dicom, of_nifti), np.asarray(of_nifti.dataobj))
    assert_reads_back(tmp_path / "out/stud/study_seg", tmp_path / "study", np.asarray(of_dicom.dataobj))
    rows = [pd.read_csv(tmp_path / f"out/{name}/function.csv").iloc[0] for name in ("cine", "stud")]
    assert rows[0]["lv_edv_ml"] == pytest.approx(rows[1]["lv_edv_ml"], abs=0.02)
    assert rows[0]["predicted_dice"] == pytest.approx(rows[1]["predicted_dice"], abs=0.011)
