"""What a model was trained with: kept in its file, compared wherever it is loaded, followed where nothing is given."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, messages_of
from monai.bundle import ConfigParser
from monai.fl.client.monai_algo import compute_weight_diff
from monai.networks.utils import copy_model_state

from components.networks import find_model, resolve_settings
from components.networks.heads import CNNHead
from components.networks.prompt_free_sam import PromptFreeSam
from components.networks.trained_with import decode_record, encode_record
from components.networks.unet import GreyUNet
from components.sam.encoder import SamEncoder

RECORD = {
    "class_names": ["RV", "Myo", "LV"],
    "out_channels": 4,
    "image_size": 64,
    "depth": 2,
    "canvas_size": 128,
    "crop_size": 96,
    "slice_axis": 0,
    "normalisation": [1, 99],
    "test_time_views": 2,
    "trained_views": 4,
}
OTHERS = {
    "class_names": ["LV", "Myo", "RV"],
    "out_channels": 3,
    "image_size": 80,
    "depth": 3,
    "canvas_size": 256,
    "crop_size": 64,
    "slice_axis": 2,
    "normalisation": [0.5, 99.5],
}
BUNDLE = {"model_type": "vit_tiny", "sam_checkpoint": None}


def unet(**record) -> GreyUNet:
    return GreyUNet(4, 1, trained_with=record)


def cnn(**record) -> PromptFreeSam:
    return PromptFreeSam(SamEncoder("vit_tiny", image_size=64), CNNHead(4, depth=2), trained_with=record)


def record_of(network) -> dict:
    return decode_record(network.state_dict()["trained_with"])


def parsed(*names: str, bundle: str = "cnnhead_acdc", overlay: Path | None = None, **knobs) -> ConfigParser:
    parser = ConfigParser()
    files = [REPOSITORY / f"bundles/{bundle}/configs/{name}.json" for name in names]
    parser.read_config([*files, overlay] if overlay else files)
    parser.update(BUNDLE | knobs if bundle != "unet_acdc" else knobs)
    return parser


def refusal(parser: ConfigParser, name: str) -> str:
    with pytest.raises(Exception) as caught:  # MONAI wraps a component's error in one of its own
        parser.get_parsed_content(name)
    return messages_of(caught.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A `model.pt` of the CNN head trained with `RECORD`."""
    path = str(tmp_path_factory.mktemp("models") / "model.pt")
    torch.save(cnn(**RECORD).state_dict(), path)
    return path


def test_a_record_comes_back_from_any_type_of_number():
    values = encode_record(RECORD | {"class_names": ["Höhle"]})
    for kind in (torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.int64):
        assert decode_record(values.to(kind)) == RECORD | {"class_names": ["Höhle"]}


def test_a_record_too_long_is_refused():
    with pytest.raises(ValueError, match=r"in 2048 bytes of JSON, received .*shorter class_names"):
        unet(class_names=["x" * 3000])


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("network", [unet, cnn])
def test_a_state_dict_that_was_trained_otherwise_is_refused_before_anything_is_copied(network, name):
    trained, other = network(**RECORD), network(**RECORD | {name: OTHERS[name]})
    with torch.no_grad():
        for value in trained.parameters():
            value.add_(1)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(RuntimeError) as caught:
        other.load_state_dict(trained.state_dict())
    assert f"trained with {name} {RECORD[name]}, received {OTHERS[name]}: set {name} to {RECORD[name]}" in str(
        caught.value
    )
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("network", [unet, cnn])
def test_an_equal_training_loads_strictly_and_a_network_without_a_record_takes_the_files(network):
    state = network(**RECORD).state_dict()
    for other in (network(**RECORD), network()):
        other.load_state_dict(state, strict=True)
        assert record_of(other) == RECORD


def test_a_state_dict_without_a_record_is_refused_as_incomplete():
    state = unet(**RECORD).state_dict()
    del state["trained_with"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "trained_with"'):
        unet(**RECORD).load_state_dict(state)


def test_a_start_must_agree_and_the_new_training_keeps_its_own_record(tmp_path):
    path = str(tmp_path / "model.pt")
    torch.save(unet(**RECORD).state_dict(), path)
    own = RECORD | {"normalisation": None, "test_time_views": 4, "trained_views": 1}
    network = GreyUNet(4, 1, start_checkpoint=path, trained_with=own)
    assert record_of(network) == own | {"trained_views": 4}  # those that the start has seen
    with pytest.raises(ValueError, match=r"model.pt does not fit.*trained with crop_size 96, received 64"):
        GreyUNet(4, 1, start_checkpoint=path, trained_with=own | {"crop_size": 64})


def test_a_fresh_network_is_not_validated_in_views_that_it_is_never_shown():
    with pytest.raises(ValueError, match=r"test_time_views of at most 1.*received 8: give --test_time_views 1"):
        unet(test_time_views=8, trained_views=1)
    fresh = {"start_checkpoint": None, "phantom_share": 0, "cache_dir": None}
    assert "test_time_views of at most 1" in refusal(parsed("train", **fresh), "network_def")
    shown = parsed("train", **fresh | {"phantom_share": 0.5}).get_parsed_content("network_def")
    assert record_of(shown)["trained_views"] == 8


def test_the_model_is_that_of_a_training_or_else_what_comes_with_the_package_and_the_run_says_which(tmp_path, caplog):
    trained = str(tmp_path / "model.pt")
    with caplog.at_level(logging.INFO):
        assert find_model(trained) == trained
        assert find_model(trained, "shipped.pt") == "shipped.pt"
        assert f"the model is shipped.pt, since no training has written {trained}" in caplog.text
        (tmp_path / "model.pt").touch()
        assert find_model(trained, "shipped.pt") == trained
    assert caplog.messages[-1] == f"the model is {trained}, the model of a training"


def test_averaging_keeps_equal_records_and_refuses_different_ones():
    sites = [unet(**RECORD).state_dict() for _ in range(3)]
    mean = {key: torch.stack([site[key].float() for site in sites]).mean(0) for key in sites[0]}
    network = unet(**RECORD)
    copy_model_state(network, mean)
    assert record_of(network) == RECORD
    difference = compute_weight_diff(network.state_dict(), sites[0])
    assert not difference["trained_with"].any()

    different = unet(**RECORD | {"crop_size": 64, "class_names": ["a"]}).state_dict()
    mixed = {key: (value.float() + different[key].float()) / 2 for key, value in sites[0].items()}
    with pytest.raises(RuntimeError, match="must be trained with equal configurations"):
        network.load_state_dict(mixed)


def test_a_scripted_network_still_tells(caplog):
    exported = torch.jit.script(unet(**RECORD))
    assert resolve_settings(exported, {"crop_size": None}, {"crop_size": 1}) == RECORD
    with pytest.raises(ValueError, match=r"the exported network does not fit.*crop_size 96, received 64"):
        resolve_settings(exported, {"crop_size": 64}, {})
    assert not caplog.records
    plain = torch.jit.script(unet())
    assert resolve_settings(plain, {"crop_size": None}, {"crop_size": 256}) == {"crop_size": 256}
    assert "has no record of what it was trained with: crop_size 256 is assumed" in caplog.text


def test_what_inference_is_not_given_it_takes_from_the_file(model, caplog):
    parser = parsed("inference", ckpt_path=model)
    inferer, network = (parser.get_parsed_content(name) for name in ("inferer", "network_def"))
    assert inferer.roi_size == [96, 96]
    assert inferer.test_time_views == 2
    assert network.encoder.image_size == 64
    transforms = parser.get_parsed_content("preprocessing").transforms
    assert [transforms[1].scaler.lower, transforms[1].scaler.upper] == [1, 99]
    assert transforms[3].transforms[0].slice_axis == 0
    with caplog.at_level(logging.WARNING):
        network.load_state_dict(torch.load(model, weights_only=True))
    assert "trained with" not in caplog.text


@pytest.mark.parametrize("name", sorted(OTHERS.keys() - {"normalisation"}))
def test_what_inference_is_given_must_be_what_the_file_says(model, name):
    said = refusal(parsed("inference", ckpt_path=model, **{name: OTHERS[name]}), "network_def")
    assert f"{model} does not fit: it was trained with {name} {RECORD[name]}, received {OTHERS[name]}" in said
    assert "In inference null" in said


def test_overlays_are_compared_too(model, tmp_path):
    overlay = tmp_path / "overlay.json"
    overlay.write_text('{"image_size": 176, "crop_size": 176, "test_time_views": 8}')
    said = refusal(parsed("inference", overlay=overlay, ckpt_path=model), "inferer")
    for name in ("image_size 64, received 176", "crop_size 96, received 176", "set test_time_views to 4 or fewer"):
        assert name in said


@pytest.mark.parametrize(("views", "is_fine"), [(1, True), (4, True), (8, False)])
def test_inference_shows_no_view_that_training_has_not_shown(model, views, is_fine):
    parser = parsed("inference", ckpt_path=model, test_time_views=views)
    if is_fine:
        assert parser.get_parsed_content("inferer").test_time_views == views
    else:
        assert "trained with 4 of a slice's 8 turned and mirrored views" in refusal(parser, "inferer")


def test_without_a_file_the_shipped_networks_values_apply_with_a_warning(tmp_path, caplog):
    parser = parsed("inference", bundle="unet_acdc", ckpt_path=str(tmp_path / "model.pt"))
    assert parser.get_parsed_content("inferer").roi_size == [176, 176]
    assert parser.get_parsed_content("inferer").test_time_views == 8
    assert "has no record of what it was trained with" in caplog.text


def test_evaluation_compares_what_it_shows_with_what_the_file_has_been_shown(model):
    knobs = {"ckpt_path": model, "class_names": RECORD["class_names"], "cache_dir": None}
    knobs |= {"depth": RECORD["depth"], "slice_axis": RECORD["slice_axis"]}
    parser = parsed("train", "evaluate", **knobs, test_time_views=4)
    parser.get_parsed_content("network_def").load_state_dict(torch.load(model, weights_only=True))
    assert parser.get_parsed_content("validate#inferer").test_time_views == 4
    assert parser.get_parsed_content("validate#inferer").roi_size == [96, 96]
    for knob, said in (("test_time_views", "received test_time_views 8"), ("slice_axis", "slice_axis 0, received 2")):
        other = {"test_time_views": 4} | {knob: 8 if knob == "test_time_views" else 2}
        assert said in refusal(parsed("train", "evaluate", **knobs | other), "validate#inferer")


@pytest.mark.parametrize("bundle", ["autosam_acdc", "cnnhead_acdc", "linearhead_acdc"])
def test_shipped_heads_say_what_the_configs_set(bundle, caplog):
    training, inference = (parsed_as_shipped(bundle, name) for name in ("train", "inference"))
    training["cache_dir"] = None
    assert record_of(training.get_parsed_content("network_def"))["trained_views"] == 8
    assert inference.get_parsed_content("settings")["trained_views"] == 8
    assert "trained with" not in caplog.text


def parsed_as_shipped(bundle: str, name: str) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(REPOSITORY / f"bundles/{bundle}/configs/{name}.json")
    return parser
