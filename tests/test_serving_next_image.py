"""The image to label next: the arithmetic without MONAI Label, and the strategies of its server."""

import json
import os
import subprocess
from pathlib import Path
from urllib.parse import quote_plus

import numpy as np
import pytest
from conftest import REPOSITORY
from label_server import served

from components.data.acdc import list_patients
from components.phantom.dataset import write_phantom_dataset
from serving.next_image import as_text, from_text, lowest, most_different
from serving.requests import RefusalError, parse_info

ANGLES = {"a": 0, "b": 20, "c": 90, "d": 150}
VECTORS = {
    name: (1 + index) * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    for index, (name, angle) in enumerate(ANGLES.items())
}


def test_lowest_value_is_chosen_and_the_first_of_equals():
    assert lowest({"c": 0.4, "b": 0.3, "a": 0.9}) == "b"
    assert lowest({"c": 0.4, "b": 0.4}) == "b"


def test_image_farthest_from_its_nearest_labelled_one_is_chosen():
    left = {name: VECTORS[name] for name in "bcd"}
    assert most_different(left, [VECTORS["a"]]) == "d"
    left.pop("d")
    assert most_different(left, [VECTORS["a"], VECTORS["d"]]) == "c"  # 60 degrees from d, b 20 from a


def test_image_nearest_to_the_mean_is_chosen_without_labels():
    assert most_different(VECTORS, []) == "c"  # the mean of the directions is at 64 degrees
    assert most_different({name: 100 * vector for name, vector in VECTORS.items()}, []) == "c"


def test_embeddings_survive_as_text():
    vector = np.random.default_rng(0).normal(size=256)
    read = from_text(as_text(1e5 * vector))
    assert read @ vector / np.linalg.norm(vector) > 0.99999
    assert len(as_text(vector)) < 700


def test_clients_cannot_note_predictions():
    with pytest.raises(RefusalError, match="the server itself notes predictions"):
        parse_info('{"predictions": {}}')


@pytest.mark.slow
def test_next_image_is_chosen_by_dice_and_by_embedding(label_python, tmp_path):
    root = write_phantom_dataset(str(tmp_path / "phantoms"), patients=3, size_hw_d=(96, 96, 4))
    cases = [of_patient[0] for of_patient in list_patients(root).values()]
    (studies := tmp_path / "studies").mkdir()
    for name, case in zip("abc", cases, strict=True):
        (studies / f"{name}.nii.gz").write_bytes(Path(case["image"]).read_bytes())
    (studies / "broken.nii.gz").write_bytes(b"junk")
    options = ("--bundle", "linearhead_acdc")

    def chosen(client, strategy: str) -> str:
        return client.post(f"/activelearning/{quote_plus(strategy)}", {})["id"]  # as Slicer asks

    def noted(client) -> dict:
        infos = {name: json.loads(client.ask("GET", "/datastore/image/info", image=name)) for name in "abc"}
        return {name: info["predictions"]["linearhead_acdc"] for name, info in infos.items()}

    with served(label_python, tmp_path, studies, *options) as client:
        first = chosen(client, "lowest_predicted_dice")
        notes = noted(client)
        dice = {name: note["predicted_dice"]["value"] for name, note in notes.items()}
        assert len(set(dice.values())) == 3
        assert first == lowest(dice)
        vectors = {name: from_text(note["embedding"]["value"]) for name, note in notes.items()}
        assert chosen(client, "most_different_embedding") == most_different(vectors, [])
        label = Path(cases["abc".index(first)]["label"])
        client.send("PUT", "/datastore/label", "label", label, image=first, tag="final")
    with served(label_python, tmp_path, studies, *options) as client:  # which has forgotten nothing
        labelled = vectors.pop(first)
        assert chosen(client, "most_different_embedding") == most_different(vectors, [labelled])
        assert (tmp_path / "log.txt").read_text().count("Inferer::") == 0
        model = tmp_path / "app/model/linearhead_acdc/models/model.pt"
        os.utime(model)  # as after a training
        assert chosen(client, "lowest_predicted_dice") == lowest({name: dice[name] for name in vectors})
        assert (tmp_path / "log.txt").read_text().count("Inferer::") == 2
        after = noted(client)
        for name in vectors:
            assert after[name]["predicted_dice"]["of"] != notes[name]["predicted_dice"]["of"]
            assert after[name]["embedding"]["of"] == notes[name]["embedding"]["of"]  # the encoder is frozen
        assert "Traceback" not in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_without_an_encoder_embeddings_are_refused(label_python, tmp_path):
    root = write_phantom_dataset(str(tmp_path / "phantoms"), patients=1, size_hw_d=(96, 96, 4))
    with served(label_python, tmp_path, root, "--bundle", "unet_acdc") as client:
        status, said = client.refusal("POST", "/activelearning/most_different_embedding")
        assert (status, said) == (
            422,
            "none of unet_acdc has an encoder: serve a bundle that has one, such as linearhead_acdc",
        )


BEYOND_THE_LIMIT = """
from types import SimpleNamespace
import serving.torchvision_operators  # as sitecustomize does
from serving import label_app
label_app.SECONDS_OF_INFERENCE = 0.0
inferred = []
def infer(request, datastore):
    inferred.append(request["image"])
    return {"params": {"predictions": {"predicted_dice": 0.5}}}
app = SimpleNamespace(_infers={"m": SimpleNamespace(versions=lambda: {"predicted_dice": "new"})}, infer=infer)
notes = {"a": {}, "b": {}, "c": {"predictions": {"m": {"predicted_dice": {"value": 0.7, "of": "VERSION"}}}}}
store = SimpleNamespace(get_image_info=notes.get, get_unlabeled_images=lambda tag: ["c", "b", "a"])
print(label_app.LowestDice(app)({}, store), inferred)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "printed"),
    [("new", "{'id': 'c', 'weight': 0.7} []"), ("old", "{'id': 'a', 'weight': 0.5} ['a']")],
)
def test_beyond_the_limit_the_choice_is_among_the_known_images(of, printed, label_python):
    code = BEYOND_THE_LIMIT.replace("VERSION", of)
    done = subprocess.run([label_python, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == printed
