from pathlib import Path

import pytest

from components.data.acdc import CLASS_NAMES, list_patients, read_acdc
from components.data.cases import groups_of_cases, list_cases
from components.data.custom_data import FIELDS
from components.data.split import split_patients


def write_patient(folder: Path, name: str, ed: int = 1, es: int = 12) -> Path:
    """An ACDC patient of empty files, since listing reads only their names."""
    patient = folder / name
    patient.mkdir(parents=True)
    (patient / "Info.cfg").write_text(f"ED: {ed}\nES: {es}\nGroup: NOR\nHeight: 170.0\n")
    for stem in ("4d", f"frame{ed:02d}", f"frame{ed:02d}_gt", f"frame{es:02d}", f"frame{es:02d}_gt"):
        (patient / f"{name}_{stem}.nii.gz").touch()
    return patient


@pytest.fixture
def release(tmp_path) -> Path:
    for index in range(1, 21):
        write_patient(tmp_path / "training", f"patient{index:03d}")
    write_patient(tmp_path / "testing", "patient101")
    return tmp_path


def patients_of(cases) -> list[str]:
    return [Path(case["image"]).parent.name for case in cases]


def test_frames_are_read_from_info_cfg_and_4d_files_left_out(tmp_path):
    write_patient(tmp_path, "patient090", ed=4, es=11)
    cases = list_patients(str(tmp_path))["patient090"]
    assert [Path(case["image"]).name for case in cases] == [
        "patient090_frame04.nii.gz",
        "patient090_frame11.nii.gz",
    ]
    assert [Path(case["label"]).name for case in cases] == [
        "patient090_frame04_gt.nii.gz",
        "patient090_frame11_gt.nii.gz",
    ]


def test_root_and_its_training_folder_list_the_same(release):
    assert list_patients(str(release)) == list_patients(str(release / "training"))


def test_testing_folder_takes_part_only_when_asked_for(release):
    assert "patient101" not in list_patients(str(release))
    assert "patient101" in list_patients(str(release), include_testing=True)
    assert "patient101" in list_patients(str(release / "training"), include_testing=True)


@pytest.mark.parametrize(
    ("count", "held_out"), [(100, 15), (24, 4), (20, 3), (10, 2), (4, 1), (3, 0), (1, 0)], ids=lambda value: str(value)
)
def test_split_is_70_15_15_with_held_out_parts_rounded(count, held_out):
    patients = [f"patient{index:03d}" for index in range(count)]
    split = split_patients(patients, seed=0)
    assert len(split["validation"]) == len(split["test"]) == held_out
    assert sorted(split["training"] + split["validation"] + split["test"]) == patients


def test_split_depends_on_its_seed_alone():
    patients = [f"patient{index:03d}" for index in range(20)]
    assert split_patients(patients, seed=3) == split_patients(patients, seed=3)
    assert split_patients(patients, seed=3) != split_patients(patients, seed=4)


def test_the_split_of_ssl4mis_is_its_lists_of_acdcs_100_patients():
    patients = [f"patient{number:03d}" for number in range(1, 101)]
    split = split_patients(patients, "ssl4mis")
    assert {subset: len(names) for subset, names in split.items()} == {"training": 70, "validation": 10, "test": 20}
    assert sorted(name for names in split.values() for name in names) == patients
    assert split["training"][:3] == ["patient099", "patient038", "patient050"]
    assert {"patient028", "patient039"} <= set(split["validation"]) and {"patient011", "patient052"} <= set(
        split["test"]
    )


def test_the_split_of_ssl4mis_is_refused_for_other_patients_and_so_are_other_words(release):
    with pytest.raises(ValueError, match=r"patient001 to patient100.*\d+ are missing or extra, such as patient0"):
        list_cases(read_acdc(str(release)), "training", split_seed="ssl4mis")
    with pytest.raises(ValueError, match="an integer or 'ssl4mis', received 'ssl4mia'"):
        list_cases(read_acdc(str(release)), "training", split_seed="ssl4mia")


def test_subsets_share_no_patient(release):
    subsets = [
        set(patients_of(list_cases(read_acdc(str(release)), subset))) for subset in ("training", "validation", "test")
    ]
    assert [len(subset) for subset in subsets] == [14, 3, 3]
    assert len(set.union(*subsets)) == 20


def test_labelled_cases_bring_both_frames_and_smaller_choices_are_part_of_larger(release):
    one = list_cases(read_acdc(str(release)), "training", labelled_cases=1)
    five = list_cases(read_acdc(str(release)), "training", labelled_cases=5)
    assert len(one) == 2
    assert len(set(patients_of(one))) == 1
    assert len(five) == 10
    assert five[:2] == one
    assert len(list_cases(read_acdc(str(release)), "training")) == 28


def test_release_is_described_as_data_of_ones_own(release):
    data = read_acdc(str(release))
    assert set(FIELDS) <= data.keys()
    assert len(data["training"]) == 40
    assert data["training"][0].keys() == {"image", "label", "group"}
    assert data["validation"] == data["test"] == data["unlabelled"] == []
    assert groups_of_cases(data)["patient003_frame12"] == "patient003"
    assert len(read_acdc(str(release), include_testing=True)["training"]) == 42


def groups_of_frames(*sizes: int) -> dict:
    """Describe data of which each group has so many images, `a0`, `a1`, ... of the first."""
    cases = [
        {"image": f"{group}{frame}", "label": "x", "group": group}
        for group, size in zip("abc", sizes, strict=False)
        for frame in range(size)
    ]
    other = {"image": "v", "label": "x"}
    return {
        "dataset_dir": "data",
        "pictures": False,
        "training": cases,
        "validation": [other],
        "test": [],
        "unlabelled": [],
    }


def frames(data: dict, count: int | None = None, unit: str = "frames") -> list[str]:
    return [case["image"] for case in list_cases(data, "training", labelled_cases=count, label_unit=unit)]


def test_frames_of_groups_of_any_size_take_turns():
    data = groups_of_frames(3, 1, 2)
    order = list(dict.fromkeys(name[0] for name in frames(data)))
    size = {"a": 3, "b": 1, "c": 2}
    expected = [
        f"{group}{(index + turn) % size[group]}"
        for turn in range(3)
        for index, group in enumerate(order)
        if turn < size[group]
    ]
    assert frames(data, 6) == expected
    assert sorted(expected) == ["a0", "a1", "a2", "b0", "c0", "c1"]
    assert [frames(data, count) for count in range(7)] == [expected[:count] for count in range(7)]
    with pytest.raises(ValueError, match="labelled_cases must be between 0 and 6, the frames of the training"):
        frames(data, 7)
    assert [len(frames(data, count, "cases")) for count in (0, 3)] == [0, 6]


def test_the_split_of_ssl4mis_is_refused_for_data_with_a_list_of_their_own():
    with pytest.raises(ValueError, match="expected split_seed to be an integer, since the data list valid"):
        list_cases(groups_of_frames(1, 1), "training", split_seed="ssl4mis")


@pytest.mark.parametrize("subset", ["training", "validation"])
def test_a_case_without_a_label_is_named(subset):
    data = groups_of_frames(1)
    del data[subset][0]["label"]
    with pytest.raises(ValueError, match=rf"[av]0? has no label in the list `{subset}`: expected one, or the image"):
        list_cases(data, subset)


def test_the_log_names_the_first_images_and_counts_the_others(caplog):
    with caplog.at_level("INFO"):
        frames(groups_of_frames(2))
        frames(groups_of_frames(25) | {"pictures": True})
    assert "training: 2 volumes: a0, a1\n" in caplog.text
    assert "training: 25 pictures: a0, a1," in caplog.text
    assert "a19 and 5 more" in caplog.text


def test_frames_as_label_unit_come_from_as_many_patients(release):
    frames = list_cases(read_acdc(str(release)), "training", labelled_cases=5, label_unit="frames")
    assert len(frames) == len(set(patients_of(frames))) == 5
    assert len(list_cases(read_acdc(str(release)), "training", labelled_cases=28, label_unit="frames")) == 28


def test_none_may_be_labelled_where_a_training_goes_by_unlabelled_patients(release):
    assert list_cases(read_acdc(str(release)), "training", labelled_cases=0) == []


@pytest.mark.parametrize("count", [15, -1])
def test_impossible_number_of_labelled_cases_is_refused(release, count):
    with pytest.raises(ValueError, match=f"between 0 and 14, the cases of the training subset, received {count}"):
        list_cases(read_acdc(str(release)), "training", labelled_cases=count)


def test_missing_dataset_dir_says_what_to_give():
    for listing in (list_patients, lambda folder: list_cases(read_acdc(folder), "training")):
        with pytest.raises(ValueError, match=r"dataset_dir is not set.*--dataset_dir PATH"):
            listing("")
    assert read_acdc("")["class_names"] == list(CLASS_NAMES)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        list_patients("nowhere")


def test_folder_that_is_not_acdc_is_refused(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    with pytest.raises(ValueError, match=r"is not the ACDC release: expected folders patient001.*found imagesTr"):
        list_patients(str(tmp_path))


def test_patient_without_ground_truth_is_named(release):
    missing = release / "training" / "patient007" / "patient007_frame12_gt.nii.gz"
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=r"patient007 has no label of its ES frame: expected .*frame12_gt"):
        list_cases(read_acdc(str(release)), "training", labelled_cases=1)


def test_patient_without_info_or_phase_is_named(tmp_path):
    patient = write_patient(tmp_path, "patient001")
    (patient / "Info.cfg").write_text("ED: 1\n")
    with pytest.raises(ValueError, match="does not name the ES frame"):
        list_patients(str(tmp_path))
    (patient / "Info.cfg").unlink()
    with pytest.raises(ValueError, match=r"expected an Info\.cfg"):
        list_patients(str(tmp_path))


def test_too_few_patients_leave_no_test_subset_but_may_leave_no_validation(tmp_path):
    write_patient(tmp_path, "patient001")
    assert list_cases(read_acdc(str(tmp_path)), "validation") == []
    with pytest.raises(ValueError, match=r"no labelled cases to test on in .*at least 4 cases or patients.*received 1"):
        list_cases(read_acdc(str(tmp_path)), "test")


def test_unknown_subset_and_unit_are_refused(release):
    with pytest.raises(ValueError, match="unknown subset 'train'"):
        list_cases(read_acdc(str(release)), "train")
    with pytest.raises(ValueError, match="unknown label_unit 'volumes'"):
        list_cases(read_acdc(str(release)), "training", labelled_cases=1, label_unit="volumes")


def test_real_release_lists_two_frames_a_patient(acdc_dir):
    patients = list_patients(acdc_dir)
    assert all(len(cases) == 2 for cases in patients.values())
    assert all(Path(path).is_file() for cases in patients.values() for case in cases for path in case.values())


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode() + "\nNote: Größe\n".encode("latin-1"),
        lambda text: text.replace("\n", "\r").encode(),
    ],
)
def test_info_in_any_usual_encoding_is_read(tmp_path, change):
    root = write_patient(tmp_path, "patient001").parent
    expected = list_patients(str(root))
    info = next(root.rglob("Info.cfg"))
    info.write_bytes(change(info.read_text()))
    assert list_patients(str(root)) == expected


def test_info_that_is_no_text_is_named(tmp_path):
    root = write_patient(tmp_path, "patient001").parent
    info = next(root.rglob("Info.cfg"))
    info.write_bytes(b"ED: 1\0\0")
    with pytest.raises(ValueError, match=r"Info\.cfg is not text in UTF-8, UTF-16 or Latin-1"):
        list_patients(str(root))


def test_unpacked_frames_are_found(tmp_path):
    root = write_patient(tmp_path, "patient001").parent
    for path in list(root.rglob("*.nii.gz")):
        path.rename(path.with_suffix(""))
    (cases,) = list_patients(str(root)).values()
    assert all(path.endswith(".nii") for case in cases for path in case.values())


def test_linked_patient_is_found_and_a_dead_link_named(tmp_path):
    patient = write_patient(tmp_path / "a", "patient001")
    root = patient.parent
    patient.rename(tmp_path / "elsewhere")
    patient.symlink_to(tmp_path / "elsewhere")
    assert list(list_patients(str(root))) == [patient.name]
    patient.unlink()
    patient.symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="is a link whose target is missing"):
        list_patients(str(root))
