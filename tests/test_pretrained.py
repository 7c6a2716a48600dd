"""The weights shipped with the package: their files, and the scores that their record states."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from components.networks.heads import CNNHead, DeepLabHead, LinearHead, ViTHead
from components.networks.prompt_free_sam import PromptFreeSam
from components.networks.unet import GreyUNet
from components.pretrained import pretrained_file
from components.pretraining.phantom_stream import phantom_stacks
from components.sam.encoder import SamEncoder

HEADS = {
    "vit": lambda: ViTHead(4),
    "cnn": lambda: CNNHead(4, depth=2),
    "deeplab": lambda: DeepLabHead(4),
    "linear": lambda: LinearHead(4),
}
ENCODER = "phantom_unet.pth"
FEW = {"stacks": 2}


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads(Path(pretrained_file(ENCODER)).with_name("record.json").read_text())


def network(name: str, image_size: int) -> PromptFreeSam:
    encoder = SamEncoder("phantom_unet", pretrained_file(ENCODER), image_size)
    return PromptFreeSam(encoder, HEADS[name](), start_checkpoint=pretrained_file(f"{name}_head.pt")).eval()


def test_files_are_those_of_the_record_and_small_enough_to_ship(record):
    assert len(record["sha256"]) == 8
    for name, digest in record["sha256"].items():
        assert hashlib.sha256(Path(pretrained_file(name)).read_bytes()).hexdigest() == digest, name
    shipped = [path for path in Path(pretrained_file(ENCODER)).parent.iterdir() if path.suffix in (".pt", ".pth")]
    assert {path.name for path in shipped} == {
        *record["sha256"],
        "general_unet.pth",
        "general_linear_head.pt",
    }
    sizes = [path.stat().st_size for path in shipped]
    assert max(sizes) < 25e6 and sum(sizes) < 40e6


def test_weights_are_fp16_and_the_decoder_loads_like_any_sam_checkpoint():
    state = torch.load(pretrained_file(ENCODER), weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert {key.partition(".")[0] for key in state} == {"image_encoder", "prompt_encoder", "mask_decoder"}
    ViTHead(4, pretrained_file(ENCODER))


@pytest.mark.parametrize(
    "name", [name if name == "linear" else pytest.param(name, marks=pytest.mark.slow) for name in HEADS]
)
def test_each_head_scores_on_phantoms_what_the_record_says(name, record):
    model = network(name, record["training"]["settings"]["image_size"])
    assert mean_dice(model, record["dice_on"]) == pytest.approx(record["dice"][name]["mean"], abs=0.01)


@pytest.fixture(scope="module")
def linear_on_few(record) -> float:
    """The score of the linear head on the first phantoms of the record."""
    return mean_dice(network("linear", record["training"]["settings"]["image_size"]), record["dice_on"] | FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "cnn", "deeplab"])
def test_on_a_few_of_the_phantoms_each_head_differs_from_the_linear_one_as_in_the_record(name, record, linear_on_few):
    model = network(name, record["training"]["settings"]["image_size"])
    difference = record["dice"][name]["mean"] - record["dice"]["linear"]["mean"]
    assert mean_dice(model, record["dice_on"] | FEW) == pytest.approx(linear_on_few + difference, abs=0.01)


def test_unet_scores_on_phantoms_what_heads_do(record, linear_on_few):
    state = torch.load(pretrained_file("unet.pt"), weights_only=True)
    assert {value.dtype for key, value in state.items() if key != "trained_with"} == {torch.float16}
    model = GreyUNet(4, 16, start_checkpoint=pretrained_file("unet.pt")).eval()
    assert mean_dice(model, record["dice_on"] | FEW) >= linear_on_few - 0.02


def mean_dice(model: torch.nn.Module, drawn: dict) -> float:
    canvas = {"size": drawn["canvas_size"], "field_mm": drawn["field_mm"]}
    stacks = phantom_stacks(drawn["stacks"], drawn["slices_per_stack"], seed=drawn["seed"], **canvas)
    scores = []
    for stack in stacks:
        slices = stack["image"].permute(3, 0, 1, 2)
        with torch.no_grad():
            prediction = model(slices.expand(-1, 3, -1, -1)).argmax(1)
        truth = stack["label"].permute(3, 0, 1, 2)[:, 0]
        for label in (1, 2, 3):
            overlap = ((prediction == label) & (truth == label)).sum()
            scores.append(2 * overlap / ((prediction == label).sum() + (truth == label).sum()))
    return float(torch.stack(scores).mean())


def test_a_head_refuses_another_encoder():
    with pytest.raises(ValueError, match="fingerprint"):
        PromptFreeSam(SamEncoder("phantom_unet"), HEADS["linear"](), start_checkpoint=pretrained_file("linear_head.pt"))


def test_record_names_no_folder(record):
    text = json.dumps(record)
    assert "/" not in re.sub(r"configs/\w+\.json", "", text), text
