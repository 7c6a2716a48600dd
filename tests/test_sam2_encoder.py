"""SAM 2.1's image encoders and its decoder for clicks: equal to others' code, and files of several programs."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, succeeds
from PIL import Image
from torch import nn

from adapt.new import new_bundle
from adapt.template import Instance
from components.networks.click_networks import click_corrector, click_encoder
from components.networks.corrector import against_rest
from components.networks.heads import ViTHead
from components.sam.checkpoint import read_checkpoint
from components.sam.encoder import SamEncoder
from components.sam.encoders import IMAGENET_MEAN, IMAGENET_STD
from components.sam.sam2_decoder import Sam2Decoder
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

POSITIONS = "positional_embedding"
METAS_DECODER = (  # likewise
    (r"^(prompt_encoder|mask_decoder)\.", r"sam_\1."),
    (r"^no_memory_embedding$", "no_mem_embed"),
    (r"layer_norm(\d|_final_attn)\.(?=weight|bias)", r"norm\1."),
    (r"\.o_proj\.", ".out_proj."),
    (r"(transformer\.layers\.\d\.mlp)\.proj_in", r"\1.layers.0"),
    (r"(transformer\.layers\.\d\.mlp)\.proj_out", r"\1.layers.1"),
    (r"(mlps\.\d|_head)\.layers\.0", r"\1.layers.1"),
    (r"(mlps\.\d|_head)\.proj_in", r"\1.layers.0"),
    (r"(mlps\.\d|_head)\.proj_out", r"\1.layers.2"),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"mask_embed\.conv1", "mask_downscaling.0"),
    (r"mask_embed\.norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"),
    (r"mask_embed\.norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
    (rf"shared_embedding\.{POSITIONS}", "pe_layer.positional_encoding_gaussian_matrix"),
)
CLICKS = torch.tensor([[10.0, 30.5], [40.25, 3.0], [0.0, 47.0]]), torch.tensor([1, 0, 1])

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


def metas_modules(monkeypatch, *names: str) -> list[Any]:
    """Modules of Meta's own package, if it is installed; of the packages it needs it uses none here."""
    for name in ("hydra", "hydra.core", "hydra.core.global_hydra", "iopath", "iopath.common", "iopath.common.file_io"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    return [pytest.importorskip(f"sam2.modeling.{name}", reason="needs pip install --no-deps sam2") for name in names]


def metas_encoder(model_type: str, monkeypatch) -> nn.Module:
    """Meta's own module, as `metas_modules` finds it."""
    names = ("backbones.hieradet", "backbones.image_encoder", "position_encoding")
    hieradet, pyramid, positions = metas_modules(monkeypatch, *names)
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


@pytest.fixture
def metas_whole_file(sam2_checkpoint, tmp_path) -> str:
    """A checkpoint of `transformers` as Meta's file, whose parts for videos are not read."""
    state = read_checkpoint(sam2_checkpoint)
    encoder = {key.removeprefix("vision_encoder."): state[key] for key in state if key.startswith("vision_encoder.")}
    others: dict = {"memory_encoder.out_proj.weight": torch.ones(2, 2), "no_mem_pos_enc": torch.ones(1, 1, 256)}
    for key in state.keys() - {f"vision_encoder.{key}" for key in encoder} - {"shared_image_embedding." + POSITIONS}:
        name = key
        for pattern, replacement in METAS_DECODER:
            name = re.sub(pattern, replacement, name)
        others[name] = state[key]
    points = others.pop("sam_prompt_encoder.point_embed.weight").split(1)
    others |= {f"sam_prompt_encoder.point_embeddings.{row}.weight": point for row, point in enumerate(points)}
    others |= {f"image_encoder.{key}": value for key, value in metas_keys(encoder).items()}
    torch.save({"model": others}, tmp_path / "whole.pt")
    return str(tmp_path / "whole.pt")


def test_the_decoder_is_that_of_meta(metas_whole_file, monkeypatch):
    decoders, encoders, transformers = metas_modules(
        monkeypatch, "sam.mask_decoder", "sam.prompt_encoder", "sam.transformer"
    )
    prompts = encoders.PromptEncoder(256, (6, 6), (96, 96), mask_in_chans=16).eval()
    decoder = decoders.MaskDecoder(  # the arguments in Meta's `sam2_base.py` and, for SAM 2.1, its `.yaml`
        transformer_dim=256,
        transformer=transformers.TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048),
        use_high_res_features=True,
        iou_prediction_use_sigmoid=True,
        dynamic_multimask_via_stability=True,
        dynamic_multimask_stability_delta=0.05,
        dynamic_multimask_stability_thresh=0.98,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
    ).eval()
    state = read_checkpoint(metas_whole_file)
    for part, module in (("sam_prompt_encoder.", prompts), ("sam_mask_decoder.", decoder)):
        module.load_state_dict({key.removeprefix(part): state[key] for key in state if key.startswith(part)})
    fine, middle, coarse = (torch.randn(1, 256, side, side) for side in (24, 12, 6))
    (points, signs), mask = CLICKS, 4 * torch.randn(1, 1, 24, 24)
    with torch.no_grad():
        sparse, dense = prompts(points=(points[None], signs[None]), boxes=None, masks=mask)
        expected, *_ = decoder(
            image_embeddings=coarse + state["no_mem_embed"].view(1, -1, 1, 1),
            image_pe=prompts.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            repeat_image=False,
            high_res_features=[decoder.conv_s0(fine), decoder.conv_s1(middle)],
        )
        packed = torch.cat([fine, F.pixel_shuffle(middle, 2), F.pixel_shuffle(coarse, 4)], dim=1)
        received = Sam2Decoder(96, metas_whole_file).eval()(packed, points[None], signs[None], mask)
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def with_click(path: str, image_size: int, images: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    encoder = click_encoder(None, crop_size=48, encoder=SamEncoder(TINY, path, image_size))
    corrected = click_corrector(encoder, path)(encoder(images), logits, [{2: CLICKS}])
    return against_rest(corrected[0], 2)


@pytest.mark.parametrize("image_size", [64, 96])
def test_a_class_with_clicks_has_the_logits_that_transformers_gives_it(image_size, sam2_checkpoint, metas_whole_file):
    import transformers

    images, logits = torch.rand(1, 3, 48, 48) * 255, 4 * torch.randn(1, 4, 48, 48)
    sizes = [[image_size // stride] * 2 for stride in (4, 8, 16)]
    vision = transformers.Sam2VisionConfig(backbone_feature_sizes=sizes)
    config = transformers.Sam2Config(vision_config=vision, prompt_encoder_config={"image_size": image_size})
    model = transformers.Sam2Model(config).eval()
    model.load_state_dict(read_checkpoint(sam2_checkpoint))
    (points, signs), encoder = CLICKS, SamEncoder(TINY, sam2_checkpoint, image_size)
    prompts = {
        "pixel_values": encoder.preprocess(images),
        "input_points": points[None, None] * (image_size / 48),
        "input_labels": signs[None, None],
        "input_masks": against_rest(logits[0], 2)[None, None],
        "multimask_output": False,
    }
    with torch.no_grad():
        expected = F.interpolate(model(**prompts).pred_masks[0], size=[48, 48], mode="bilinear")[0, 0]
        model.mask_decoder.dynamic_multimask_via_stability = False
        first = F.interpolate(model(**prompts).pred_masks[0], size=[48, 48], mode="bilinear")[0, 0]
    assert expected.std() > 0.1
    assert not torch.allclose(first, expected, rtol=0, atol=0.1)  # of the other three masks
    for path in (sam2_checkpoint, metas_whole_file):
        torch.testing.assert_close(with_click(path, image_size, images, logits), expected, rtol=0, atol=1e-5)


def test_embeddings_for_clicks_are_not_taken_from_the_cache_or_put_there(sam2_checkpoint, tmp_path):
    encoder = SamEncoder(TINY, sam2_checkpoint, 64, cache_dir=str(tmp_path), cache_dtype="float32")
    images = torch.rand(1, 3, 64, 64) * 255
    for_clicks = click_encoder("general_unet", crop_size=64, encoder=encoder)
    first, plain, again = for_clicks(images), encoder(images), for_clicks(images)
    assert plain.shape == (1, 256, 16, 16)
    assert first.shape == (1, 336, 16, 16)
    assert torch.equal(first, again)
    assert torch.equal(encoder(images), plain)


def test_clicks_need_the_whole_file_from_which_the_encoder_comes(sam2_checkpoint, tmp_path):
    def corrector(encoder, path):
        return click_corrector(click_encoder(None, crop_size=48, encoder=encoder), path)

    encoder = SamEncoder(TINY, sam2_checkpoint, 64)
    state = read_checkpoint(sam2_checkpoint)
    of_encoder = {key: value for key, value in state.items() if key.startswith("vision_encoder.")}
    torch.save(of_encoder, tmp_path / "encoder.pth")
    with pytest.raises(
        ValueError,
        match=r"has no mask decoder of SAM 2\.1: expected also the keys of Meta's file \(sam_mask_decoder\.\*\) or of "
        r"transformers \(mask_decoder\.\*\); received only keys that begin with vision_encoder; give --sam_checkpoint",
    ):
        corrector(encoder, str(tmp_path / "encoder.pth"))
    torch.save({key: value for key, value in state.items() if "t_encoder.shared" not in key}, tmp_path / "once.pth")
    corrector(encoder, str(tmp_path / "once.pth"))  # as where the two equal positional embeddings are saved once
    torch.save({key: value for key, value in state.items() if "conv_s0" not in key}, tmp_path / "partial.pth")
    with pytest.raises(ValueError, match=r"missing: decoder\.mask_decoder\.conv_s0\.weight"):
        corrector(encoder, str(tmp_path / "partial.pth"))
    with pytest.raises(FileNotFoundError, match="no encoder checkpoint at"):
        corrector(encoder, str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match=f"received the encoder {TINY}, which has no file"):
        corrector(encoder, None)
    with pytest.raises(ValueError, match="the encoder was trained further than"):
        corrector(SamEncoder(TINY, sam2_checkpoint, 64, trainable="neck"), sam2_checkpoint)

    network = corrector(encoder, sam2_checkpoint)
    assert not any(weight.requires_grad for weight in network.parameters())
    network(torch.zeros(0), torch.zeros(0), [])
    with torch.no_grad():
        encoder.image_encoder.neck.convs[0].weight += 0.1  # as by the weights of a bundle
    with pytest.raises(ValueError, match="give a bundle that was trained with --trainable_encoder False"):
        network(torch.zeros(0), torch.zeros(0), [])


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
