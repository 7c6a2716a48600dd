"""SAM 2.1's image encoders: equal to Meta's code, and files of several programs that hold one."""

import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, succeeds
from PIL import Image
from torch import nn

from adapt.new import new_bundle
from adapt.template import Instance
from components.networks.heads import ViTHead
from components.sam.encoder import SamEncoder
from components.sam.encoders import IMAGENET_MEAN, IMAGENET_STD
from components.sam.sam2_encoder import SAM2_ARCHITECTURES, Sam2Encoder

pytest.importorskip("transformers", reason="needs pip install -c constraints.txt -e '.[encoders]'")

TINY = "sam2.1_hiera_tiny"
META_FROM_OURS = (  # written apart from the code under test
    ("backbone.", "trunk."),
    ("layer_norm", "norm"),
    ("patch_embed.projection", "patch_embed.proj"),
    ("mlp.proj_in", "mlp.layers.0"),
    ("mlp.proj_out", "mlp.layers.1"),
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder() -> Sam2Encoder:
    return random_encoder(TINY)


def random_encoder(model_type: str) -> Sam2Encoder:
    """An encoder without a weight that is 0 or 1, such as transformers' positional embeddings."""
    torch.manual_seed(3)
    encoder = Sam2Encoder(SAM2_ARCHITECTURES[model_type]).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return encoder


def metas_keys(state: dict) -> dict:
    """The keys of Meta's file, for weights with ours."""
    renamed = {}
    for key, value in state.items():
        for ours, metas in META_FROM_OURS:
            key = key.replace(ours, metas)
        if key.startswith("neck."):
            key = key.replace(".weight", ".conv.weight").replace(".bias", ".conv.bias")
        renamed[key] = value
    return renamed


def metas_encoder(model_type: str, monkeypatch) -> nn.Module:
    """Meta's own module, if its package is installed; of the packages it needs it uses none here."""
    hydra = types.ModuleType("hydra")
    hydra.initialize_config_module = lambda *_args, **_options: None
    monkeypatch.setitem(sys.modules, "hydra", hydra)
    reason = "needs pip install --no-deps sam2"
    hieradet = pytest.importorskip("sam2.modeling.backbones.hieradet", reason=reason)
    pyramid = pytest.importorskip("sam2.modeling.backbones.image_encoder", reason=reason)
    positions = pytest.importorskip("sam2.modeling.position_encoding", reason=reason)
    # the arguments in Meta's `sam2.1_hiera_*.yaml`
    small = {"window_pos_embed_bkg_spatial_size": (7, 7)}
    arguments: dict = {
        "sam2.1_hiera_tiny": {"stages": (1, 2, 7, 2), "global_att_blocks": (5, 7, 9), **small},
        "sam2.1_hiera_small": {"stages": (1, 2, 11, 2), "global_att_blocks": (7, 10, 13), **small},
        "sam2.1_hiera_base_plus": {"embed_dim": 112, "num_heads": 2},
        "sam2.1_hiera_large": {
            "embed_dim": 144,
            "num_heads": 2,
            "stages": (2, 6, 36, 4),
            "global_att_blocks": (23, 33, 43),
            "window_spec": (8, 4, 16, 8),
            **small,
        },
    }
    trunk = hieradet.Hiera(**arguments[model_type])
    neck = pyramid.FpnNeck(
        positions.PositionEmbeddingSine(256, normalize=True, scale=None, temperature=10000),
        d_model=256,
        backbone_channel_list=trunk.channel_list,
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    return pyramid.ImageEncoder(trunk, neck, scalp=1).eval()


def summed(maps: list) -> torch.Tensor:
    fine, middle, coarse = maps
    return fine + F.interpolate(middle, scale_factor=2) + F.interpolate(coarse, scale_factor=4)


@pytest.mark.parametrize(
    ("model_type", "size_hw"), [(TINY, (64, 64)), (TINY, (192, 128)), ("sam2.1_hiera_base_plus", (64, 64))]
)
def test_embeddings_are_the_sum_of_the_feature_maps_of_metas_encoder(model_type, size_hw, monkeypatch):
    ours, metas = random_encoder(model_type), metas_encoder(model_type, monkeypatch)
    metas.load_state_dict(metas_keys(ours.state_dict()))
    images = torch.randn(2, 3, *size_hw)
    with torch.no_grad():
        expected, received = summed(metas(images)["backbone_fpn"]), ours(images)
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("image_size", [64, 160])
def test_embeddings_are_the_sum_of_the_feature_maps_of_transformers(encoder, image_size):
    from transformers import Sam2VisionConfig, Sam2VisionModel

    whole = Sam2VisionModel(Sam2VisionConfig()).eval()  # by default the tiny one
    whole.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        expected, received = summed(whole(images).fpn_hidden_states), encoder(images)
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("model_type", SAM2_ARCHITECTURES)
def test_weights_and_windows_are_those_of_metas_encoder(model_type, monkeypatch):
    with torch.device("meta"):
        ours = Sam2Encoder(SAM2_ARCHITECTURES[model_type])
    metas = metas_encoder(model_type, monkeypatch)
    expected = {key: value.shape for key, value in metas.state_dict().items()}
    assert {key: value.shape for key, value in metas_keys(ours.state_dict()).items()} == expected
    assert [block.window_size for block in ours.backbone.blocks] == [block.window_size for block in metas.trunk.blocks]


def save_metas(state: dict, folder: Path) -> str:
    others = {"sam_mask_decoder.iou_token.weight": torch.ones(1, 256), "no_mem_embed": torch.ones(1, 1, 256)}
    whole = {f"image_encoder.{key}": value for key, value in metas_keys(state).items()}
    torch.save({"model": others | whole}, folder / "sam2.1_hiera_tiny.pt")
    return str(folder / "sam2.1_hiera_tiny.pt")


def save_folder(state: dict, folder: Path) -> str:
    from safetensors.torch import save_file

    others = {"mask_decoder.iou_token.weight": torch.ones(1, 256), "no_memory_embedding": torch.ones(1, 1, 256)}
    save_file(others | {f"vision_encoder.{key}": value for key, value in state.items()}, folder / "model.safetensors")
    return str(folder)


FORMS = {
    "Meta's file": save_metas,
    "a folder of the Hub": save_folder,
    "model.safetensors": lambda state, folder: save_folder(state, folder) + "/model.safetensors",
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoint_is_loaded(form, encoder, tmp_path):
    path = FORMS[form](encoder.state_dict(), tmp_path)
    loaded = SamEncoder(TINY, path, image_size=64)
    state = loaded.image_encoder.state_dict()
    assert state.keys() == encoder.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in encoder.state_dict().items())
    images = torch.rand(1, 3, 64, 64) * 255
    with torch.no_grad():
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        torch.testing.assert_close(loaded(images), encoder((images - mean) / std))
    other = SamEncoder(TINY, path, image_size=96)
    assert torch.equal(other.state_dict()["fingerprint"], loaded.state_dict()["fingerprint"])
    assert not torch.equal(SamEncoder(TINY, image_size=64).fingerprint, loaded.fingerprint)


def test_files_that_do_not_fit_are_refused(encoder, tmp_path):
    path = save_metas(encoder.state_dict(), tmp_path)
    with pytest.raises(
        ValueError, match=f"is a {TINY} checkpoint, but model_type is sam2.1_hiera_small: give --model_type"
    ):
        SamEncoder("sam2.1_hiera_small", path, image_size=64)
    with pytest.raises(
        ValueError, match=f"is a {TINY} checkpoint, but model_type is vit_tiny: give --model_type {TINY}"
    ):
        SamEncoder("vit_tiny", path, image_size=64)
    with pytest.raises(ValueError, match=r"missing: image_encoder\.neck\.convs\.0\.weight"):
        short = {key: value for key, value in encoder.state_dict().items() if key != "neck.convs.0.weight"}
        SamEncoder(TINY, save_metas(short, tmp_path), image_size=64)
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"model.safetensors is not a readable checkpoint"):
        SamEncoder(TINY, str(tmp_path), image_size=64)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no encoder checkpoint at .*/empty/model.safetensors"):
        SamEncoder(TINY, str(tmp_path / "empty"), image_size=64)


@pytest.mark.parametrize("image_size", [16, 176])
def test_image_sizes_other_than_multiples_of_32_are_refused(image_size):
    with pytest.raises(ValueError, match=f"image_size must be a positive multiple of 32, received {image_size}"):
        SamEncoder(TINY, image_size=image_size)


def test_sams_decoder_is_refused(encoder, tmp_path):
    path = save_metas(encoder.state_dict(), tmp_path)
    with pytest.raises(
        ValueError, match=r"is of SAM 2\.1, which lacks SAM's mask decoder: use the CNN head or the linear"
    ):
        ViTHead(4, path)
    with pytest.raises(ValueError, match=f"autosam starts from SAM's mask decoder, which {TINY} lacks: use cnnhead"):
        Instance("autosam", cases="custom", hearts=False, model_type=TINY)


def test_neck_alone_is_trained():
    encoder = SamEncoder(TINY, image_size=64, trainable="neck").train()
    encoder(torch.rand(1, 3, 64, 64) * 255).square().mean().backward()
    trained = {name for name, weight in encoder.named_parameters() if weight.grad is not None}
    assert trained == {f"image_encoder.neck.convs.{level}.{kind}" for level in range(4) for kind in ("weight", "bias")}
    assert not encoder.image_encoder.backbone.training
    assert encoder.image_encoder.neck.training


def test_random_weights_are_the_same_in_every_run_and_said_loudly(caplog):
    with caplog.at_level(logging.WARNING):
        first, second = (SamEncoder(TINY, image_size=64) for _ in range(2))
    assert torch.equal(first.fingerprint, second.fingerprint)
    assert "sam2.1_hiera_tiny image encoder has RANDOM weights" in caplog.text


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Four pictures of a bright square, with labels."""
    folder = tmp_path / "pictures"
    for role in ("images", "labels"):
        (folder / role).mkdir(parents=True)
    for index in range(4):
        label = np.zeros([64, 64], dtype=np.uint8)
        label[8 + index : 40, 8:40] = 1
        Image.fromarray(label).save(folder / f"labels/{index}.png")
        Image.fromarray(40 + 150 * label).save(folder / f"images/{index}.png")
    return folder


@pytest.mark.slow
def test_a_new_bundle_trains_evaluates_and_infers(encoder, pictures, tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    checkpoint = save_folder(encoder.state_dict(), hub)
    bundle, _ = new_bundle(
        "squares", pictures, tmp_path, network="linearhead", model_type=TINY, sam_checkpoint=checkpoint
    )
    autosam = [sys.executable, "-m", "autosam"]
    for arguments in (
        ["train", str(bundle), "--steps", "2"],
        ["evaluate", str(bundle)],
        ["segment", str(pictures / "images/0.png"), "--bundle", str(bundle)],
    ):
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        succeeds(
            subprocess.run(
                autosam + arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
        )
    state = torch.load(bundle / "models/model.pt", weights_only=True)
    assert torch.equal(state["encoder.fingerprint"], SamEncoder(TINY, checkpoint, 64).fingerprint)
    assert not any("image_encoder" in key for key in state)
    assert (bundle / "eval/metrics.csv").is_file()
    assert list((tmp_path / "segmented").glob("*_pred.*"))
