"""The shipped weights, from which all bundles start. Most tests replace them by small random weights."""

import json
import logging
import re
import shutil
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, messages_of, run_monai_bundle_here
from monai.bundle import ConfigParser, ReferenceResolver
from scipy import ndimage

from components.networks.heads import CNNHead, LinearHead, ViTHead
from components.networks.prompt_free_sam import PromptFreeSam
from components.phantom.dataset import write_phantom_dataset
from components.pretrained import pretrained_file
from components.sam.encoder import SamEncoder
from components.training.command_line import read_command_line, refuse_unknown_knobs

HEADS = {
    "autosam_acdc": ("vit_head.pt", lambda: ViTHead(4)),
    "cnnhead_acdc": ("cnn_head.pt", lambda: CNNHead(4, depth=2)),
    "linearhead_acdc": ("linear_head.pt", lambda: LinearHead(4)),
}
SHIPPED = {bundle: name for bundle, (name, _) in HEADS.items()} | {"unet_acdc": "unet.pt"}
RUNS = {"training": ("train",), "evaluating": ("train", "evaluate"), "inferring": ("inference",)}
POOL_SIZE = "train#prepare_batch#pool_size"


def config(bundle: str, *names: str) -> list[str]:
    return [str(REPOSITORY / "bundles" / bundle / "configs" / f"{name}.json") for name in names]


@pytest.fixture(scope="session")
def weights(sam_vit_b, tmp_path_factory) -> Path:
    """A SAM checkpoint with a tiny encoder, and for each bundle the fp16 weights of a head that knows this encoder."""
    folder = tmp_path_factory.mktemp("weights")
    state = {key: value for key, value in sam_vit_b.state_dict().items() if not key.startswith("image_encoder.")}
    encoder = SamEncoder("phantom_unet").image_encoder.state_dict()
    encoder["neck.0.weight"] = encoder["neck.0.weight"] + 0.1
    state |= {f"image_encoder.{key}": value for key, value in encoder.items()}
    torch.save(state, folder / "phantom_unet.pth")
    for name, head in HEADS.values():
        state = PromptFreeSam(SamEncoder("phantom_unet", str(folder / "phantom_unet.pth")), head()).state_dict()
        torch.save({key: v.half() if v.is_floating_point() else v for key, v in state.items()}, folder / name)
    return folder


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> str:
    """Four patients: two train, one validates, one tests."""
    return write_phantom_dataset(str(tmp_path_factory.mktemp("data") / "phantoms"), patients=4, size_hw_d=(64, 48, 3))


def knobs(bundle: str, weights: Path, **others) -> dict:
    """Overrides that put the small weights in the place of the trained ones, at a size that is quick."""
    files = {"sam_checkpoint": weights / "phantom_unet.pth", "start_checkpoint": weights / HEADS[bundle][0]}
    return {name: str(value) for name, value in files.items()} | {"image_size": 64} | others


def parsed(bundle: str, names: tuple[str, ...], **overrides) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(config(bundle, *names))
    parser.update(overrides)
    return parser


def run(run_id: str, bundle: str, *names: str, **overrides) -> None:
    overrides = {name: str(value) if isinstance(value, Path) else value for name, value in overrides.items()}
    monai.bundle.run(run_id, config_file=config(bundle, *names), logging_file=False, **overrides)


@pytest.mark.parametrize("bundle", SHIPPED)
def test_training_and_inference_start_from_the_same_files_that_come_with_the_package(bundle):
    train, inference = (json.loads(Path(config(bundle, name)[0]).read_text()) for name in ("train", "inference"))
    assert train["start_checkpoint"] == inference["start_checkpoint"]
    assert parsed(bundle, ("train",)).get_parsed_content("start_checkpoint") == pretrained_file(SHIPPED[bundle])
    if bundle == "unet_acdc":
        return
    assert train["model_type"] == inference["model_type"] == "phantom_unet"
    assert parsed(bundle, ("train",)).get_parsed_content("sam_checkpoint") == pretrained_file("phantom_unet.pth")
    assert train.get("depth") == (2 if bundle == "cnnhead_acdc" else None)


@pytest.mark.parametrize("bundle", SHIPPED)
def test_what_inference_takes_for_granted_is_what_training_records(bundle):
    trained_with = parsed(bundle, ("train",)).get_parsed_content("trained_with")
    assumed = parsed(bundle, ("inference",)).get_parsed_content("settings#defaults")
    assert assumed.keys() | {"slice_axis", "trained_views"} == trained_with.keys()
    assert assumed.items() <= trained_with.items()


@pytest.mark.parametrize("bundle", SHIPPED)
def test_start_is_left_out_for_another_encoder_and_by_the_papers_recipe(bundle):
    parser = parsed(bundle, ("train", "sam" if bundle in HEADS else "from_scratch"))
    assert parser.get_parsed_content("start_checkpoint") is None
    if bundle in HEADS:
        for names in (("train",), ("inference",)):
            assert parsed(bundle, names, model_type="vit_b").get_parsed_content("start_checkpoint") is None


@pytest.mark.parametrize("names", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("bundle", HEADS)
def test_network_is_built_in_every_run(bundle, names, weights):
    parser = parsed(bundle, names, bundle_root="b", **knobs(bundle, weights, cache_dir="$None"))
    network = parser.get_parsed_content("network_def")
    assert parser.get_parsed_content("largest_component") is True
    if names[0] == "inference":
        assert parser.get_parsed_content("ckpt_path") == str(weights / HEADS[bundle][0])
        assert parser.get_parsed_content("inferer").test_time_views == 8
        return
    state = torch.load(weights / HEADS[bundle][0], weights_only=True)
    same = [torch.equal(value, state[f"head.{key}"].float()) for key, value in network.head.state_dict().items()]
    assert all(same) == ("evaluate" not in names)  # which loads the trained model alone
    assert parser.get_parsed_content("validate#inferer").test_time_views == (8 if "evaluate" in names else 2)


@pytest.mark.parametrize("bundle", HEADS)
def test_fresh_head_is_one_option_away(bundle, weights):
    overrides = knobs(bundle, weights, start_checkpoint="$None", cache_dir="$None")
    head = parsed(bundle, RUNS["training"], **overrides).get_parsed_content("network_def").head
    state = torch.load(weights / HEADS[bundle][0], weights_only=True)
    assert any(not torch.equal(value, state[f"head.{key}"].float()) for key, value in head.state_dict().items())
    inference = parsed(bundle, RUNS["inferring"], bundle_root="b", **overrides)
    assert inference.get_parsed_content("ckpt_path") == "b/models/model.pt"


@pytest.mark.parametrize("names", RUNS.values(), ids=RUNS)
def test_knobs_of_the_start_are_known_on_every_command_line(names):
    options = ["--start_checkpoint", "$None", "--slice_smoothing", "0.2", "--test_time_views", "2"]
    command = ["monai", "run", "--config_file", str(config("autosam_acdc", *names)), *options]
    refuse_unknown_knobs([*command, "--largest_component", "False", "--sam_checkpoint", "x.pth"])
    with pytest.raises(ValueError, match="Did you mean '--slice_smoothing'"):
        refuse_unknown_knobs([*command, "--slices_smoothing", "0.2"])
    if "train" in names:
        refuse_unknown_knobs([*command, "--phantom_share", "0.2"])
        with pytest.raises(ValueError, match="Did you mean '--phantom_share'"):
            refuse_unknown_knobs([*command, "--phantoms_share", "0.2"])


@pytest.fixture(scope="session")
def adapted(weights, phantoms, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a head adapted from its start, by steps that ruin it, and what the run said."""
    folder = tmp_path_factory.mktemp("adapted")
    messages: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: messages.append(record.getMessage())
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(listener)
    root.setLevel(logging.INFO)
    try:
        overrides = knobs("linearhead_acdc", weights, dataset_dir=phantoms, cache_dir=folder / "embeddings")
        overrides |= {"ckpt_dir": folder / "models", "output_dir": folder / "eval", POOL_SIZE: 16}
        run("training", "linearhead_acdc", "train", **overrides, epochs=2, val_interval=1, learning_rate=10)
    finally:
        root.removeHandler(listener)
        root.setLevel(level)
    return folder, "\n".join(messages)


def test_adapted_head_is_never_below_its_start(adapted, weights):
    folder, said = adapted
    assert f"the network starts from {weights / 'linear_head.pt'}" in said
    assert "epoch 0: best validation score so far" in said
    last = torch.load(folder / "models" / "checkpoint_epoch=2.pt", weights_only=True)
    assert last["best_epoch"] == 0
    model = torch.load(folder / "models" / "model.pt", weights_only=True)
    start = torch.load(weights / "linear_head.pt", weights_only=True)
    assert all(torch.equal(model[key], value.to(model[key])) for key, value in start.items() if key != "trained_with")


def test_evaluation_takes_the_adapted_head_whatever_the_start(adapted, weights, phantoms, tmp_path, caplog):
    folder, _ = adapted
    overrides = knobs("linearhead_acdc", weights, dataset_dir=phantoms, cache_dir=folder / "embeddings")
    names = RUNS["evaluating"]
    with caplog.at_level(logging.INFO):
        run("evaluating", "linearhead_acdc", *names, **overrides, ckpt_dir=folder / "models", output_dir=tmp_path)
    assert f"Restored all variables from {folder / 'models' / 'model.pt'}" in caplog.text
    assert f"the model is {folder / 'models' / 'model.pt'}, the model of a training" in caplog.text
    assert (tmp_path / "metrics.csv").is_file()
    with pytest.raises(Exception) as caught:  # MONAI wraps a component's error in one of its own
        overrides |= {"start_checkpoint": "$None", "ckpt_dir": tmp_path}
        run("evaluating", "linearhead_acdc", *names, **overrides, output_dir=tmp_path)
    assert f"expected a trained model at '{tmp_path / 'model.pt'}'" in messages_of(caught.value)


@pytest.mark.parametrize("bundle", ["linearhead_acdc", "unet_acdc"])
def test_evaluation_without_a_trained_model_scores_what_comes_with_the_package(bundle, phantoms, tmp_path, caplog):
    folders = {"dataset_dir": phantoms, "ckpt_dir": tmp_path / "models", "output_dir": tmp_path / "eval"}
    cache = {"cache_dir": "$None"} if bundle in HEADS else {}
    with caplog.at_level(logging.INFO):
        run("evaluating", bundle, *RUNS["evaluating"], **folders, **cache, test_time_views=1)
    shipped, trained = pretrained_file(SHIPPED[bundle]), tmp_path / "models/model.pt"
    assert f"the model is {shipped}, since no training has written {trained}" in caplog.text
    assert f"Restored all variables from {shipped}" in caplog.text
    scores = pd.read_csv(tmp_path / "eval/summary.csv").set_index("class")
    assert scores.loc["mean", "dice_mean"] > 0.5


def test_a_neck_is_adapted_with_the_head_scored_and_taken_by_inference_from_the_model(weights, phantoms, tmp_path):
    bundle, model = "linearhead_acdc", tmp_path / "model.pt"
    overrides = knobs(bundle, weights, dataset_dir=phantoms, ckpt_dir=tmp_path, output_dir=tmp_path / "eval")
    overrides |= {"start_checkpoint": "$None"}  # no start that could be kept
    run("training", bundle, "train", "neck", **overrides, steps=2, **{POOL_SIZE: 16})
    run("evaluating", bundle, "train", "evaluate", "neck", **overrides)
    assert (tmp_path / "eval/metrics.csv").is_file()

    inference = parsed(bundle, RUNS["inferring"], **knobs(bundle, weights, ckpt_path=str(model)))
    network = inference.get_parsed_content("network_def")
    network.load_state_dict(torch.load(model, weights_only=True))
    start = SamEncoder("phantom_unet", str(weights / "phantom_unet.pth")).image_encoder.state_dict()
    adapted = network.encoder.image_encoder.state_dict()
    changed = {key.partition(".")[0] for key, value in adapted.items() if not torch.equal(value, start[key])}
    assert changed == {"up_4", "neck"}


@pytest.fixture(scope="session")
def oblique(tmp_path_factory) -> Path:
    """A volume that is neither square nor upright."""
    affine = np.array([[1.2, 0.3, 0, -80], [-0.3, 1.2, 0, 40], [0, 0, -9.5, 12], [0, 0, 0, 1]])
    voxels = ndimage.gaussian_filter(np.random.RandomState(0).rand(154, 224, 3), (6, 6, 0)).astype(np.float32)
    path = tmp_path_factory.mktemp("oblique") / "case.nii.gz"
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


@pytest.mark.parametrize("bundle", HEADS)
def test_views_and_largest_components_keep_shape_and_affine(bundle, weights, oblique, tmp_path, caplog):
    overrides = knobs(bundle, weights, dataset_dir=oblique, output_dir=tmp_path, bundle_root=tmp_path)
    with caplog.at_level(logging.INFO):
        run("inferring", bundle, "inference", **overrides)
    start, trained = weights / HEADS[bundle][0], tmp_path / "models/model.pt"
    assert f"the model is {start}, since no training has written {trained}" in caplog.text
    assert f"Restored all variables from {start}" in caplog.text
    image, prediction = nib.load(oblique), nib.load(tmp_path / "case_pred.nii.gz")
    assert prediction.shape == (154, 224, 3)
    assert np.array_equal(prediction.affine, image.affine)
    labels = np.asarray(prediction.dataobj)
    assert [ndimage.label(labels == value, np.ones((3, 3, 3)))[1] <= 1 for value in (1, 2, 3)] == [True] * 3


def test_trained_model_wins_over_the_start_and_a_given_one_over_both(adapted, weights, oblique, tmp_path, caplog):
    trained = adapted[0] / "models/model.pt"
    given = shutil.copy(trained, tmp_path / "given.pt")
    overrides = knobs("linearhead_acdc", weights, dataset_dir=oblique, bundle_root=adapted[0], output_dir=tmp_path)
    for chosen, options in {trained: {}, given: {"ckpt_path": given}}.items():
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run("inferring", "linearhead_acdc", "inference", **overrides, **options, test_time_views=1)
        assert re.findall(r"Restored all variables from (\S+)", caplog.text) == [str(chosen)]


MENDING = ("EndAtValved", "CloseWalld")
NO_ANATOMY = {"minimum_lv_share": 0, "minimum_rv_probability": 0, "minimum_wall_mm": 0}


@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize(
    ("names", "key", "others"),
    [
        (("train",), "validate#postprocessing", 3),
        (RUNS["evaluating"], "validate#postprocessing", 5),
        (("inference",), "postprocessing", 4),
    ],
    ids=["train", "evaluate", "infer"],
)
def test_largest_component_is_a_switch(names, key, others, switch):
    parser = parsed("linearhead_acdc", names, largest_component=switch, slice_smoothing=0, **NO_ANATOMY)
    transforms = parser.get_parsed_content(key).transforms
    assert len(transforms) == others + switch
    assert ("KeepLargestConnectedComponentd" in {type(transform).__name__ for transform in transforms}) == switch


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (("train",), "validate#postprocessing"),
        (("train", "sam"), "validate#postprocessing"),
        (RUNS["evaluating"], "validate#postprocessing"),
        (("inference",), "postprocessing"),
    ],
    ids=["train", "paper", "evaluate", "infer"],
)
def test_anatomy_is_mended_unless_a_knob_or_the_papers_recipe_says_no(names, key):
    def mended_by(**options: float) -> list[str]:
        transforms = parsed("linearhead_acdc", names, **options).get_parsed_content(key).transforms
        return [each for each in (type(transform).__name__ for transform in transforms) if each in MENDING]

    assert mended_by() == ([] if "sam" in names else [*MENDING])
    assert not mended_by(**NO_ANATOMY)


@pytest.mark.parametrize(("typed", "kept"), [("true", True), ("FALSE", False)])
@pytest.mark.parametrize("names", RUNS.values(), ids=RUNS)
def test_largest_component_is_a_switch_in_whatever_letters_it_is_typed(names, typed, kept):
    variables: dict = {}
    command = ["monai", "run", "--config_file", str(config("linearhead_acdc", *names)), "--largest_component", typed]
    read_command_line({ReferenceResolver._vars: variables}, argv=command)
    assert variables == {"largest_component": kept}


def test_smaller_component_of_a_class_goes_and_an_absent_class_is_no_matter():
    parser = parsed("linearhead_acdc", ("inference",), largest_component=True, slice_smoothing=0, **NO_ANATOMY)
    transform = parser.get_parsed_content("postprocessing").transforms[2]
    labels = torch.zeros(1, 6, 6, 2)
    labels[0, :3, :3, 0] = 1  # nine voxels and two, apart; of another class two, that touch the nine
    labels[0, 5, 4:, 1] = 1
    labels[0, 3, :2, 1] = 3
    expected = labels.clone()
    expected[0, 5, 4:, 1] = 0
    assert torch.equal(transform({"pred": labels})["pred"], expected)


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (("train",), "validate#postprocessing"),
        (RUNS["evaluating"], "validate#postprocessing"),
        (("inference",), "postprocessing"),
    ],
    ids=["train", "evaluate", "infer"],
)
def test_a_slice_follows_its_neighbours_where_they_are_surer(names, key):
    scores = torch.zeros(2, 8, 8, 3)
    scores[0], scores[1, ..., 0], scores[1, ..., 2] = 0.55, 0.9, 0.9
    scores[1, ..., 1] = 0.45

    def middle(slice_smoothing: float) -> torch.Tensor:
        parser = parsed("linearhead_acdc", names, slice_smoothing=slice_smoothing, **NO_ANATOMY)
        first = parser.get_parsed_content(key).transforms[0]
        smoothed = first({"pred": scores})["pred"] if type(first).__name__ == "GaussianSmoothd" else scores
        return smoothed.argmax(dim=0)[..., 1]

    assert torch.equal(middle(0), torch.zeros(8, 8))
    assert torch.equal(middle(0.6), torch.ones(8, 8))
    assert torch.equal(middle(0.2), torch.zeros(8, 8))


@pytest.mark.parametrize(
    "bundle",
    [
        pytest.param("autosam_acdc", marks=pytest.mark.slow),
        pytest.param("cnnhead_acdc", marks=pytest.mark.slow),
        "linearhead_acdc",
        "unet_acdc",
    ],
)
def test_copy_of_a_bundle_segments_and_adapts_with_nothing_but_the_package(bundle, phantoms, tmp_path):
    copy = tmp_path / "elsewhere" / bundle
    shutil.copytree(REPOSITORY / "bundles" / bundle / "configs", copy / "configs")
    volume = next(Path(phantoms).rglob("*frame??.nii.gz"))

    infer = ("run", "inferring", "--config_file", "configs/inference.json", "--dataset_dir", str(volume))
    run_monai_bundle_here(*infer, cwd=copy)
    prediction = nib.load(copy / "eval" / volume.name.replace(".nii.gz", "_pred.nii.gz"))
    assert prediction.shape == nib.load(volume).shape
    assert np.unique(prediction.get_fdata()).tolist() == [0, 1, 2, 3]
    small = ("--epochs", "1", "--views", "1", f"--{POOL_SIZE}", "4", "--test_time_views", "1")
    train = ("run", "training", "--config_file", "configs/train.json", "--dataset_dir", phantoms)
    run_monai_bundle_here(*train, *small, cwd=copy)
    assert (copy / "models" / "model.pt").is_file()
