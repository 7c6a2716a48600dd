"""MONAI Label's server corrects segmentations by clicks, as 3D Slicer and OHIF ask for it."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from label_server import served
from test_custom_data import decathlon
from test_release import trained

from adapt.new import new_bundle
from serving.requests import POINTS, RefusalError, check_settings


def test_clicks_of_a_request_are_lists_of_voxels():
    offered = {"lv": POINTS, "background": POINTS, "label": ""}
    given = {"lv": [[1, 2, 3], [4, 5.0, 6]], "background": [], "label": "LV"}
    assert check_settings(given, offered) == {"lv": [[1, 2, 3], [4, 5, 6]], "background": [], "label": "LV"}
    for wrong in ("$x", [1, 2, 3], [[1, "$x", 3]], [[1, 2, 0.5]], [[1, 2, True]], [[1]], [[1, 2, 3]] * 1001):
        with pytest.raises(RefusalError, match="lv is no list of clicks: expected at most 1000"):
            check_settings({"lv": wrong}, offered)
    with pytest.raises(RefusalError, match="no setting 'rv'"):
        check_settings({"rv": [[1, 2, 3]]}, offered)


@pytest.mark.slow
def test_clicks_correct_their_slices_and_are_replayed_on_the_answer_before_them(
    label_python, tiny_sam_checkpoint, tmp_path
):
    data = decathlon(tmp_path / "data", real=False)
    torch.manual_seed(0)
    options = {"network": "linearhead", "model_type": "vit_tiny", "sam_checkpoint": tiny_sam_checkpoint}
    bundle = trained(new_bundle("organ", data, tmp_path, **options)[0], image_size=64)
    described = json.loads((bundle / "configs/data.json").read_text())
    first_class, second_class = (name.lower() for name in described["class_names"][:2])
    (studies := tmp_path / "studies").mkdir()
    for case in described["training"][:2]:
        (studies / Path(case["image"]).name).write_bytes((data / case["image"]).read_bytes())
    image, other = (path.name.removesuffix(".nii.gz") for path in sorted(studies.glob("*.nii.gz"))[:2])
    with served(label_python, tmp_path, studies, "--bundle", str(bundle)) as client:
        models = json.loads(client.ask("GET", "/info/"))["models"]
        assert list(models) == ["organ", "organ_clicks"]
        assert (models["organ"]["type"], models["organ_clicks"]["type"]) == ("segmentation", "deepedit")
        assert models["organ_clicks"]["labels"] == models["organ"]["labels"] | {"background": 3}  # after both classes

        def labels(model: str, name: str = image, **clicks) -> np.ndarray:
            (tmp_path / "answer.nii.gz").write_bytes(client.form(f"/infer/{model}", clicks, image=name, output="image"))
            return np.asarray(nib.load(tmp_path / "answer.nii.gz").dataobj).copy()

        plain = labels("organ")
        assert np.array_equal(labels("organ_clicks"), plain)
        none = {first_class: [], second_class: [], "background": [], "label": first_class}  # as Slicer sends them
        assert np.array_equal(labels("organ_clicks", **none), plain)
        clicks = none | {second_class: [[8, 11, 1], [9, 12, 1]], "background": [[2, 2, 1]]}
        corrected = labels("organ_clicks", **clicks)
        assert np.array_equal(corrected[..., [0, 2]], plain[..., [0, 2]])
        assert not np.array_equal(corrected[..., 1], plain[..., 1])
        more = labels("organ_clicks", **clicks | {first_class: [[8, 16, 2]]})
        assert np.array_equal(more[..., [0, 1]], corrected[..., [0, 1]])
        assert np.array_equal(labels("organ_clicks", other), labels("organ", other))
        assert np.array_equal(labels("organ_clicks", **clicks), corrected)

        log = (tmp_path / "log.txt").read_text()
        assert log.count("clicks correct") == 6
        assert log.count("PRE - Run Transform") == 2 + 3  # of the plain model twice; image, other image, image again

        assert np.array_equal(labels("organ_clicks"), plain)  # OHIF sends no list of a class without clicks

        for wrong, said in (
            ({first_class: [[8, 11, 3]]}, "is outside the image: expected [0, 0, 0] to"),
            ({first_class: [[8, 11, 1]], "background": [[8, 11, 1]]}, "is clicked as"),
        ):
            with pytest.raises(Exception, match="422") as error:
                labels("organ_clicks", **wrong)
            assert said in json.loads(error.value.read())["detail"]
        assert "Traceback" not in (tmp_path / "log.txt").read_text()
