"""The encoders of DINOv2, DINOv3 and SAM 3: equal to those of `transformers`, and files that hold one."""

import dataclasses
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn

from adapt.new import new_bundle
from adapt.template import Instance
from autosam.__main__ import main
from components.networks.heads import CNNHead, LinearHead, ViTHead
from components.networks.prompt_free_sam import PromptFreeSam
from components.sam.checkpoint import read_checkpoint
from components.sam.defaults import default_checkpoint, default_image_size
from components.sam.dino_encoder import ConvNext, ConvNextEncoder, Dino2Encoder, Dino3Encoder, Vit
from components.sam.encoder import SamEncoder
from components.sam.encoders import ENCODERS, IMAGENET_MEAN, IMAGENET_STD, page_of
from components.sam.sam3_encoder import Sam3Encoder, Sam3Vit

transformers = pytest.importorskip("transformers", reason="needs pip install -c constraints.txt -e '.[encoders]'")

pytestmark = pytest.mark.usefixtures("one_thread")

DINO2, DINO3, CONVNEXT, SAM3 = "dinov2_vits", "dinov3_vits", "dinov3_convnext_tiny", "sam3"
NEW = [name for name, entry in ENCODERS.items() if entry.family in ("DINOv2", "DINOv3", "SAM 3")]
SMALL_VIT, SMALL_CONVNEXT = Vit(48, 3, 2), ConvNext((1, 1, 2, 1), (8, 16, 24, 32))
SMALL_SAM3 = Sam3Vit(embed_dim=64, mlp_dim=96, depth=3, num_heads=2, global_blocks=(1,))
SMALL = {  # entries of the table with a small module
    DINO2: {"build": partial(Dino2Encoder, SMALL_VIT), "out_channels": 48, "neck": ("layer.2", "norm")},
    DINO3: {"build": partial(Dino3Encoder, SMALL_VIT), "out_channels": 48, "neck": ("layer.2", "norm")},
    CONVNEXT: {"build": partial(ConvNextEncoder, SMALL_CONVNEXT), "out_channels": 80},
    SAM3: {"build": partial(Sam3Encoder, SMALL_SAM3)},
}
SIZES = {DINO2: (56, 126), DINO3: (64, 160), CONVNEXT: (64, 160), SAM3: (112, 406)}
VIT_CONFIG = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def theirs(model_type: str, image_size: int) -> nn.Module:
    """The same encoder as a whole model of `transformers`, without a weight that is 0 or 1."""
    torch.manual_seed(3)
    if model_type == DINO2:
        model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=518, **VIT_CONFIG))
    elif model_type == DINO3:
        config = transformers.DINOv3ViTConfig(num_register_tokens=4, intermediate_size=192, **VIT_CONFIG)
        model = transformers.DINOv3ViTModel(config)
    elif model_type == CONVNEXT:
        config = transformers.DINOv3ConvNextConfig(
            depths=list(SMALL_CONVNEXT.depths), hidden_sizes=list(SMALL_CONVNEXT.widths)
        )
        model = transformers.DINOv3ConvNextModel(config)
    else:
        trunk = transformers.Sam3ViTConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=2,
            global_attn_indexes=[1],
            image_size=image_size,
        )
        model = transformers.Sam3VisionModel(transformers.Sam3VisionConfig(backbone_config=trunk))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def expected_map(model_type: str, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The embeddings by the model's own forward pass."""
    with torch.no_grad():
        if model_type == CONVNEXT:
            _, *maps = model(images, output_hidden_states=True).hidden_states
            maps = maps if maps[0].shape[-1] == images.shape[-1] // 4 else maps[1:]
            return torch.cat([F.interpolate(each, size=maps[0].shape[2:]) for each in maps], dim=1)
        output = model(images)
    if model_type == SAM3:
        return output.fpn_hidden_states[2]
    side = images.shape[-1] // ENCODERS[model_type].stride
    return output.last_hidden_state[:, -side * side :].reshape(len(images), side, side, -1).permute(0, 3, 1, 2)


@pytest.fixture(autouse=True)
def small_encoders(monkeypatch, request):
    """The table with small modules, unless a test asks for the real ones."""
    if "real_encoders" not in request.fixturenames:
        for name, changes in SMALL.items():
            monkeypatch.setitem(ENCODERS, name, dataclasses.replace(ENCODERS[name], **changes))


@pytest.fixture
def real_encoders():
    """Keep the table as it is."""


def saved(model: nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def with_keys(rename: Callable[[str], str], folder: str, path: Path) -> str:
    """A file of torch.save with the weights of a folder under other keys."""
    from safetensors.torch import load_file

    state = load_file(Path(folder) / "model.safetensors")
    torch.save({rename(key): value for key, value in state.items()}, path)
    return str(path)


@pytest.mark.parametrize(("model_type", "image_size"), [(name, size) for name in SMALL for size in SIZES[name]])
def test_embeddings_are_those_of_transformers_for_a_folder_of_the_hub(model_type, image_size, tmp_path):
    model = theirs(model_type, image_size)
    encoder = SamEncoder(model_type, saved(model, tmp_path), image_size)
    images = torch.rand(2, 3, image_size, image_size) * 255
    entry = ENCODERS[model_type]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (entry.pixel_mean, entry.pixel_std))
    expected, received = expected_map(model_type, model, (images - mean) / std), encoder(images)
    assert received.shape == (2, encoder.out_channels, image_size // encoder.stride, image_size // encoder.stride)
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_colours_are_normalised_as_each_family_does():
    imagenet = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    for name in (DINO2, DINO3, CONVNEXT):
        entry = ENCODERS[name]
        assert (entry.pixel_mean, entry.pixel_std) == (IMAGENET_MEAN, IMAGENET_STD)
        np.testing.assert_allclose([entry.pixel_mean, entry.pixel_std], 255 * np.array(imagenet))
    assert set(ENCODERS[SAM3].pixel_mean + ENCODERS[SAM3].pixel_std) == {127.5}


@pytest.mark.parametrize("model_type", SMALL)
@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0)])
def test_a_bright_corner_changes_the_token_in_that_corner_most(model_type, corner):
    size = SIZES[model_type][0]
    encoder = SamEncoder(model_type, image_size=size)
    entry = ENCODERS[model_type]
    images = torch.tensor(entry.pixel_mean).view(1, 3, 1, 1).repeat(2, 1, size, size)
    patch = entry.size_multiple
    rows, columns = ((slice(None, patch), slice(-patch, None))[index] for index in corner)
    images[1, :, rows, columns] += 100
    without, with_it = encoder(images)
    change = (with_it - without).square().sum(0)
    row, column = np.unravel_index(int(change.argmax()), change.shape)
    tokens = patch // entry.stride + (model_type == SAM3)  # whose last convolution of 3x3 sees the token's neighbours
    side = size // entry.stride
    assert row in range(side)[slice(None, tokens) if corner[0] == 0 else slice(-tokens, None)]
    assert column in range(side)[slice(None, tokens) if corner[1] == 0 else slice(-tokens, None)]


@pytest.mark.usefixtures("real_encoders")
def test_sizes_are_those_of_the_published_models():
    # of the models' cards, in millions; without what no forward pass of a head uses
    millions = {
        "dinov2_vits": 22,
        "dinov2_vitb": 87,
        "dinov2_vitl": 304,
        "dinov3_vits": 22,
        "dinov3_vitb": 86,
        "dinov3_vitl": 303,
        "dinov3_convnext_tiny": 28,
        "dinov3_convnext_small": 49,
        "dinov3_convnext_base": 88,
        "dinov3_convnext_large": 196,
        "sam3": 447,  # of 454, less the neck's three other maps
    }
    assert list(millions) == NEW
    for name, expected in millions.items():
        with torch.device("meta"):
            encoder = ENCODERS[name].build(ENCODERS[name].size_multiple)
        assert round(sum(parameter.numel() for parameter in encoder.parameters()) / 1e6) == expected, name
        for part in ENCODERS[name].neck:
            assert list(encoder.get_submodule(part).parameters()), (name, part)


@pytest.mark.usefixtures("real_encoders")
@pytest.mark.parametrize(
    ("model_type", "crop_size", "image_size"),
    [(DINO2, 176, 518), (DINO3, 176, 512), (SAM3, 40, 1008), (CONVNEXT, 176, 192), (CONVNEXT, 64, 64)],
)
def test_default_image_size_drops_no_pixel(model_type, crop_size, image_size):
    assert default_image_size(model_type, crop_size) == image_size
    assert image_size % ENCODERS[model_type].size_multiple == 0


@pytest.mark.parametrize(
    ("model_type", "image_size", "multiple"), [(DINO2, 176, 14), (DINO3, 500, 16), (CONVNEXT, 176, 32)]
)
def test_image_sizes_of_which_pixels_would_be_dropped_are_refused(model_type, image_size, multiple):
    with pytest.raises(
        ValueError, match=f"image_size must be a positive multiple of {multiple}, received {image_size}"
    ):
        SamEncoder(model_type, image_size=image_size)


PREFIXES = {DINO2: "dinov2.", DINO3: "dinov3.", CONVNEXT: "backbone.model.", SAM3: "detector_model.vision_encoder."}


@pytest.mark.parametrize("model_type", SMALL)
def test_a_file_and_keys_with_a_prefix_are_read_as_the_folder_is(model_type, tmp_path):
    size = SIZES[model_type][0]
    folder = saved(theirs(model_type, size), tmp_path)
    encoder = SamEncoder(model_type, folder, size)
    prefixed = with_keys(lambda key: PREFIXES[model_type] + key, folder, tmp_path / "prefixed.pth")
    own = {f"image_encoder.{key}": value for key, value in encoder.image_encoder.state_dict().items()}
    torch.save(own, tmp_path / "own.pth")
    for path in (f"{folder}/model.safetensors", prefixed, str(tmp_path / "own.pth")):
        assert torch.equal(SamEncoder(model_type, path, size).fingerprint, encoder.fingerprint), path
    assert not torch.equal(SamEncoder(model_type, image_size=size).fingerprint, encoder.fingerprint)


def test_files_that_do_not_fit_are_refused(tmp_path):
    folder = saved(theirs(DINO3, 64), tmp_path / "hub")
    with pytest.raises(ValueError, match="is a dinov3_vits checkpoint, but model_type is dinov2_vits: give"):
        SamEncoder(DINO2, folder, 56)
    with pytest.raises(ValueError, match="is a dinov3_vits checkpoint, but model_type is vit_tiny"):
        SamEncoder("vit_tiny", folder, 64)
    names = (("layer.", "blocks."), ("attention.", "attn."), ("embeddings.", ""), ("register_tokens", "storage_tokens"))

    def metas(key: str) -> str:
        for hub, meta in names:
            key = key.replace(hub, meta)
        return key

    path = with_keys(metas, folder, tmp_path / "meta.pth")
    with pytest.raises(
        ValueError, match=r"not a checkpoint of dinov3_vits: expected the keys of transformers, .*Meta's own .pth"
    ):
        SamEncoder(DINO3, path, 64)
    path = with_keys(lambda key: key.replace("1.norm1.bias", "1.norm1.shift"), folder, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"missing: .*layer\.1\.norm1\.bias; extra: .*layer\.1\.norm1\.shift"):
        SamEncoder(DINO3, path, 64)
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded/model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has its weights in several files: expected one model\.safetensors"):
        SamEncoder(DINO3, str(tmp_path / "sharded"), 64)
    with pytest.raises(FileNotFoundError, match=r"its page is https://huggingface.co/facebook/dinov3-vits16"):
        SamEncoder(DINO3, str(tmp_path / "nowhere"), 64)


@pytest.mark.parametrize("model_type", [name for name in NEW if name != SAM3])
def test_without_a_file_it_is_said_where_to_get_one(model_type):
    address = r"https://huggingface\.co/facebook/dinov"
    assert default_checkpoint("models", model_type) == f"models/{model_type}"
    with pytest.raises(FileNotFoundError, match=f"its page is {address}"):
        read_checkpoint(default_checkpoint("models", model_type), page=page_of(model_type))
    with pytest.raises(ValueError, match=f"get it from {address}.*, and give --checkpoint FILE"):
        Instance("linearhead", cases="custom", hearts=False, model_type=model_type)


def test_the_general_encoder_that_ships_has_no_decoder_of_sam_and_that_of_hearts_has():
    with pytest.raises(
        ValueError,
        match="starts from SAM's mask decoder, which general_unet lacks: use cnnhead, deeplabhead or linearhead",
    ):
        Instance("autosam", cases="custom", hearts=False, model_type="general_unet")
    for file in (None, "x.pth"):
        Instance("autosam", cases="custom", hearts=False, model_type="phantom_unet", sam_checkpoint=file)


@pytest.mark.parametrize("model_type", [DINO2, SAM3])
def test_sams_decoder_is_refused(model_type, tmp_path):
    with pytest.raises(
        ValueError,
        match=f"starts from SAM's mask decoder, which {model_type} lacks: use cnnhead, deeplabhead or linearhead",
    ):
        Instance("autosam", cases="custom", hearts=False, model_type=model_type, sam_checkpoint="x.pth")
    folder = saved(theirs(model_type, 112), tmp_path)
    with pytest.raises(ValueError, match=f"is of {ENCODERS[model_type].family}, which lacks SAM's mask decoder"):
        ViTHead(4, folder)


@pytest.mark.parametrize("model_type", SMALL)
def test_neck_or_all_of_it_is_trained_and_a_frozen_one_takes_it_over(model_type):
    size = SIZES[model_type][0]
    images = torch.rand(2, 3, size, size) * 255
    for trainable in ("neck", True):
        encoder = SamEncoder(model_type, image_size=size, trainable=trainable).train()
        encoder(images).square().mean().backward()
        trained = {name for name, weight in encoder.image_encoder.named_parameters() if weight.grad is not None}
        expected = {
            name
            for name, _ in encoder.image_encoder.named_parameters()
            if trainable is True or any(name.startswith(f"{part}.") for part in ENCODERS[model_type].neck)
        }
        assert trained == expected
        torch.optim.SGD([weight for weight in encoder.parameters() if weight.requires_grad], lr=0.1).step()
        frozen = SamEncoder(model_type, image_size=size)
        assert frozen.state_dict().keys() == {"fingerprint"}
        frozen.load_state_dict(encoder.state_dict())
        torch.testing.assert_close(frozen(images), encoder.eval()(images))


@pytest.mark.parametrize("head", [LinearHead, CNNHead])
def test_a_head_makes_256_channels_of_any_others_and_has_no_such_layer_for_256(head):
    options = {"depth": 2} if head is CNNHead else {}
    as_ever = head(3, **options)
    assert head(3, in_channels=256, **options).state_dict().keys() == as_ever.state_dict().keys()
    other = head(3, in_channels=48, **options)
    counts = [sum(weight.numel() for weight in each.parameters()) for each in (other, as_ever)]
    assert counts[0] - counts[1] == 48 * 256 + 256 + 2 * 256
    assert other(torch.randn(2, 48, 5, 4)).shape == (2, 3, 20, 16)


@pytest.mark.parametrize("head", [LinearHead, CNNHead])
@pytest.mark.parametrize("model_type", SMALL)
def test_scripted_traced_and_exported_network_equals_eager(model_type, head):
    size = SIZES[model_type][0]
    encoder = SamEncoder(model_type, image_size=size)
    network = PromptFreeSam(encoder, head(4, in_channels=encoder.out_channels), "fp32").eval()
    images = torch.rand(3, 3, 50, 50) * 255
    with torch.no_grad():
        expected = network(images)
    spread = float(expected.max() - expected.min())
    traced = torch.jit.trace(network, images, check_trace=False)
    exported = torch.export.export(network, (images,)).module()
    for other in (torch.jit.script(network), traced, exported):
        torch.testing.assert_close(other(images.flip(0)), expected.flip(0), rtol=0, atol=1e-5 * spread)


@pytest.mark.parametrize(
    "model_type", [DINO3, CONVNEXT, *(pytest.param(name, marks=pytest.mark.slow) for name in (DINO2, SAM3))]
)
def test_network_in_onnx_equals_eager(model_type, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install -c constraints.txt -e '.[onnx]'")
    encoder = SamEncoder(model_type, image_size=SIZES[model_type][0])
    network = PromptFreeSam(encoder, LinearHead(4, in_channels=encoder.out_channels), "fp32").eval()
    images = torch.rand(2, 3, 50, 50) * 255
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(network, (images,), path, input_names=["image"], opset_version=20, dynamo=True)
    (received,) = onnxruntime.InferenceSession(path).run(None, {"image": images.numpy()})
    with torch.no_grad():
        expected = network(images)
    torch.testing.assert_close(torch.from_numpy(received), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("model_type", SMALL)
def test_bf16_is_near_fp32_and_embeddings_are_cached(model_type, tmp_path):
    size = SIZES[model_type][0]
    encoder = SamEncoder(model_type, image_size=size, cache_dir=str(tmp_path))
    images = torch.rand(2, 3, size, size) * 255
    expected = encoder(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = encoder(images)
    assert not torch.equal(embeddings, expected)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert torch.equal(encoder(images.flip(0)), expected.flip(0))
    assert (encoder.cache.hits, encoder.cache.misses) == (2, 4)


@pytest.mark.parametrize("model_type", SMALL)
def test_random_weights_are_the_same_in_every_run_and_said_loudly(model_type, caplog):
    with caplog.at_level(logging.WARNING):
        first, second = (SamEncoder(model_type, image_size=SIZES[model_type][0]) for _ in range(2))
    assert torch.equal(first.fingerprint, second.fingerprint)
    assert all(bool(weight.isfinite().all()) for weight in first.image_encoder.parameters())
    assert f"{model_type} image encoder has RANDOM weights" in caplog.text


def squares(folder: Path, kind: str) -> Path:
    """Pictures or volumes of a bright square, with labels."""
    for role in ("images", "labels"):
        (folder / role).mkdir(parents=True)
    for index in range(4):
        label = np.zeros([64, 64], dtype=np.uint8)
        label[8 + index : 40, 8:40] = 1
        for role, pixels in (("labels", label), ("images", 40 + 150 * label)):
            if kind == "pictures":
                Image.fromarray(pixels).save(folder / f"{role}/{index}.png")
            else:
                volume = nib.Nifti1Image(np.repeat(pixels[:, :, None], 3, axis=2), np.diag([1, 1, 4, 1]))
                nib.save(volume, folder / f"{role}/{index}.nii.gz")
    return folder


@pytest.mark.usefixtures("real_encoders")
@pytest.mark.parametrize(
    ("model_type", "network", "kind", "image_size"),
    [
        (DINO3, "linearhead", "pictures", 64),
        pytest.param(DINO3, "cnnhead", "volumes", 64, marks=pytest.mark.slow),
        pytest.param(DINO2, "linearhead", "volumes", 56, marks=pytest.mark.slow),
        pytest.param(CONVNEXT, "linearhead", "volumes", 64, marks=pytest.mark.slow),
        pytest.param("sam2.1_hiera_tiny", "linearhead", "volumes", 64, marks=pytest.mark.slow),
    ],
)
def test_a_new_bundle_trains_evaluates_infers_and_is_packed(
    model_type, network, kind, image_size, tmp_path, capsys, monkeypatch
):
    from safetensors.torch import save_file

    entry = ENCODERS[model_type]
    torch.manual_seed(0)
    weights = entry.build(image_size).state_dict()
    (tmp_path / "hub").mkdir()
    save_file({f"vision_encoder.{key}": value for key, value in weights.items()}, tmp_path / "hub/model.safetensors")
    data = squares(tmp_path / "data", kind)
    image = min((data / "images").iterdir())

    def autosam(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*arguments])
        assert not ended.value.code
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    said = autosam(
        "new",
        "squares",
        str(data),
        "--network",
        network,
        "--encoder",
        model_type,
        "--checkpoint",
        str(tmp_path / "hub"),
    )
    bundle = tmp_path / "squares"
    assert entry.terms in said
    assert entry.licence in (bundle / "docs/README.md").read_text()
    assert entry.licence in json.loads((bundle / "configs/metadata.json").read_text())["copyright"]
    depth = ("--depth", "2") if network == "cnnhead" else ()
    autosam("train", str(bundle), "--steps", "2", "--image_size", str(image_size), *depth)
    autosam("evaluate", str(bundle))
    autosam("segment", str(image), "--bundle", str(bundle))
    state = torch.load(bundle / "models/model.pt", weights_only=True)
    assert not any("image_encoder" in key for key in state)
    assert (bundle / "eval/metrics.csv").is_file()
    assert list((tmp_path / "segmented").glob("*_pred.*"))
    autosam("pack", str(bundle), "--encoder-url", "https://example.org/model.safetensors")
    assert list((tmp_path / "dist").glob("squares_v*.zip"))


def test_the_documented_names_of_options_and_those_of_the_knobs_are_the_same(tmp_path):
    data = squares(tmp_path / "data", "pictures")
    folder = saved(theirs(DINO3, 64), tmp_path / "hub")
    bundle, said = new_bundle("squares", data, tmp_path, network="linearhead", model_type=DINO3, sam_checkpoint=folder)
    assert ENCODERS[DINO3].terms in said
    assert not (bundle / "large_files.yml").exists()
    config = json.loads((bundle / "configs/train.json").read_text())
    assert (config["model_type"], config["sam_checkpoint"]) == (DINO3, f"{folder}/model.safetensors")
    assert yaml.safe_load((bundle / "configs/inference.json").read_text())["model_type"] == DINO3
