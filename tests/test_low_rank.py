"""`trainable_encoder lora`: low-rank updates of queries and values are trained, saved, loaded and exported."""

import copy
import dataclasses
import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.utils import parametrize

from autosam.__main__ import main
from components.networks.heads import LinearHead
from components.networks.prompt_free_sam import PromptFreeSam
from components.sam.dino_encoder import Dino3Encoder, Vit
from components.sam.encoder import SamEncoder
from components.sam.encoders import ENCODERS
from components.sam.image_encoder import Architecture, ImageEncoder
from components.sam.sam2_encoder import Hiera, Sam2Encoder

pytestmark = pytest.mark.usefixtures("one_thread")

WITHOUT_TRANSFORMERS = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs pip install -c constraints.txt -e '.[encoders]'"
)
SMALL_SAM = Architecture(48, 3, 3, (1,), 256)
SMALL_HIERA = Hiera(24, 1, (1, 1, 2, 1), (3, 3, 3), (8, 4, 14, 7), 7)
DINO3, SAM2 = "dinov3_vits", "sam2.1_hiera_tiny"
SIZE = 64
IMAGES = torch.arange(2 * 3 * 40 * 40).view(2, 3, 40, 40).float() % 251


@pytest.fixture(
    params=[
        "vit_b",
        "vit_t",
        pytest.param(DINO3, marks=WITHOUT_TRANSFORMERS),
        pytest.param(SAM2, marks=WITHOUT_TRANSFORMERS),
    ]
)
def model_type(request, monkeypatch) -> str:
    """Each kind of projection: fused ones of SAM, MobileSAM and SAM 2.1, and separate ones of DINO."""
    small = {
        "vit_b": {"build": lambda _: ImageEncoder(SMALL_SAM)},
        DINO3: {"build": partial(Dino3Encoder, Vit(48, 3, 3)), "out_channels": 48, "neck": ("layer.2", "norm")},
        SAM2: {"build": partial(Sam2Encoder, SMALL_HIERA)},
    }
    for name, changes in small.items():
        monkeypatch.setitem(ENCODERS, name, dataclasses.replace(ENCODERS[name], **changes))
    return request.param


def network(model_type: str, trainable: bool | str = "lora") -> PromptFreeSam:
    torch.manual_seed(0)
    encoder = SamEncoder(model_type, image_size=SIZE, trainable=trainable)
    return PromptFreeSam(encoder, LinearHead(3, in_channels=encoder.out_channels), "fp32")


def trained(model_type: str) -> PromptFreeSam:
    """A network with updates that are not zero."""
    adapted = network(model_type).train()
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(IMAGES).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        optimizer.step()
    return adapted.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES)


def assert_near(received: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_start_is_exactly_the_frozen_encoder(model_type):
    assert torch.equal(network(model_type).encoder(IMAGES), network(model_type, False).encoder(IMAGES))


def test_the_updates_alone_are_trained_and_the_base_keeps_its_fingerprint(model_type):
    start, adapted = network(model_type), trained(model_type)
    assert not torch.equal(adapted.encoder(IMAGES), start.encoder(IMAGES))
    assert torch.equal(adapted.state_dict()["encoder.fingerprint"], network(model_type, False).encoder.fingerprint)
    after = dict(adapted.encoder.image_encoder.named_parameters())
    changed = {key for key, value in start.encoder.image_encoder.named_parameters() if not value.equal(after[key])}
    updates = {key for key in after if key.endswith((".weight.0.a", ".weight.0.b"))}
    assert {key.rpartition(".")[2] for key in changed} == {"a", "b"}
    assert changed <= updates
    assert {key for key, value in after.items() if value.grad is not None} == updates
    assert not any(module.training for module in adapted.train().encoder.image_encoder.modules())


def test_keys_are_untouched_and_queries_and_values_change(model_type):
    adapted = trained(model_type).encoder.image_encoder
    seen = 0
    for module in adapted.modules():
        for part in ("qkv", "q_proj", "k_proj", "v_proj"):
            projection = getattr(module, part, None)
            if projection is None:
                continue
            is_updated = parametrize.is_parametrized(projection, "weight")
            assert is_updated == (part != "k_proj")
            if is_updated:
                change = projection.weight - projection.parametrizations.weight.original
                # MobileSAM's rows are grouped by head
                groups = module.num_heads if model_type == "vit_t" else 1
                parts = change.view(groups, 3, -1, change.shape[1]).transpose(0, 1) if part == "qkv" else [change]
                are_changed = [bool(each.any()) for each in parts]
                assert are_changed == ([True, False, True] if part == "qkv" else [True])
                seen += 1
    assert seen >= 3


def test_a_model_holds_the_updates_and_is_loaded_by_any_encoder_of_the_same_weights(model_type, tmp_path):
    adapted = trained(model_type)
    torch.save(adapted.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    held = {key: value for key, value in state.items() if "image_encoder" in key}
    assert held
    assert all(key.endswith((".a", ".b")) for key in held)
    whole = sum(value.numel() for value in adapted.encoder.image_encoder.state_dict().values())
    assert sum(value.numel() for value in held.values()) < whole / 4
    expected = logits(adapted)
    for trainable in ("lora", False, "neck", True):
        other = network(model_type, trainable).eval()
        other.load_state_dict(dict(state))
        assert_near(logits(other), expected)
        other.load_state_dict(dict(state))  # a second time
        assert_near(logits(other), expected)
    frozen = network(model_type, False).eval()
    frozen.load_state_dict(dict(state))
    start = network(model_type, False).eval()
    frozen.load_state_dict(start.state_dict())  # without updates
    assert torch.equal(logits(frozen), logits(start))


def test_updates_of_another_encoder_or_in_part_are_refused(model_type):
    state = trained(model_type).state_dict()
    for trainable in ("lora", False):
        other = network(model_type, trainable)
        with torch.no_grad():
            next(iter(other.encoder.image_encoder.parameters())).add_(0.1)
        with pytest.raises(RuntimeError, match=r"encoder fingerprint .* is not .*, that of the .* encoder in use"):
            other.load_state_dict(dict(state))
        short = dict(state)
        del short[next(key for key in short if key.endswith("weight.0.b"))]
        with pytest.raises(RuntimeError, match=r"not complete|Missing key"):
            network(model_type, trainable).load_state_dict(short)


def test_a_checkpoint_with_an_encoder_of_its_own_is_no_start_for_updates(model_type):
    state = network(model_type, "neck").state_dict()
    with pytest.raises(RuntimeError, match="which trainable_encoder lora cannot start from"):
        network(model_type).load_state_dict(state)
    head_alone = network(model_type, False).state_dict()
    network(model_type).load_state_dict(head_alone)


def test_scripted_traced_and_exported_network_equals_eager(model_type):
    adapted = trained(model_type)
    expected = logits(adapted)
    traced = torch.jit.trace(adapted, IMAGES, check_trace=False)
    exported = torch.export.export(adapted, (IMAGES,)).module()
    scripted = torch.jit.script(adapted)  # the last, since torch replaces modules of the network
    for other in (traced, exported, scripted):
        assert_near(logits(other), expected)
    assert not any("parametrizations" in key for key in scripted.state_dict())


def test_copies_such_as_a_teacher_learn_apart(model_type):
    adapted = trained(model_type)
    teacher = copy.deepcopy(adapted)
    assert torch.equal(logits(teacher), logits(adapted))
    with torch.no_grad():
        for key, weight in teacher.named_parameters():
            if key.endswith("weight.0.b"):
                weight.mul_(2)
    assert not torch.equal(logits(teacher), logits(adapted))


@pytest.mark.parametrize(
    "model_type", ["phantom_unet", pytest.param("dinov3_convnext_tiny", marks=WITHOUT_TRANSFORMERS)]
)
def test_an_encoder_without_attention_is_refused(model_type):
    with pytest.raises(
        ValueError, match=f"lora adapts attention, which {model_type} lacks: give --trainable_encoder neck"
    ):
        SamEncoder(model_type, image_size=SIZE, trainable="lora")


def test_updates_of_vit_b_take_some_hundred_kilobytes():
    with torch.device("meta"):
        encoder = ENCODERS["vit_b"].build(SIZE)
    rows = sum(block.attn.qkv.weight.shape[1] for block in encoder.blocks)
    assert 2 * 4 * (2 * rows) * 4 / 1e3 == pytest.approx(590, abs=1)  # two products of rank 4, A and B, 4 bytes each


def test_a_bundle_trains_evaluates_and_segments(tmp_path, capsys, monkeypatch):
    encoder = SamEncoder("vit_tiny", image_size=SIZE).image_encoder.state_dict()
    torch.save({f"image_encoder.{key}": value for key, value in encoder.items()}, tmp_path / "tiny.pth")
    for role in ("images", "labels"):
        (tmp_path / "data" / role).mkdir(parents=True)
    for index in range(4):
        label = np.zeros([64, 64], dtype=np.uint8)
        label[8 + index : 40, 8:40] = 1
        Image.fromarray(label).save(tmp_path / f"data/labels/{index}.png")
        Image.fromarray(40 + 150 * label).save(tmp_path / f"data/images/{index}.png")
    monkeypatch.chdir(tmp_path)

    def autosam(*arguments: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main([*arguments])
        assert not ended.value.code
        capsys.readouterr()

    options = ("--encoder", "vit_tiny", "--checkpoint", "tiny.pth")
    autosam("new", "squares", "data", "--network", "linearhead", *options)
    autosam("train", "squares", "--steps", "2", "--image_size", "64", "--trainable_encoder", "lora")
    autosam("evaluate", "squares")
    autosam("segment", "data/images/0.png", "--bundle", "squares")
    state = torch.load("squares/models/model.pt", weights_only=True)
    held = {key for key in state if "image_encoder" in key}
    assert len(held) == 2 * 6  # A and B of vit_tiny's 6 blocks
    assert all(".attn.qkv.parametrizations.weight.0." in key for key in held)
    assert Path("squares/eval/metrics.csv").is_file()
    assert list(Path("segmented").glob("*_pred.*"))
