"""What every encoder of the table does alike, and files of several programs that hold one."""

import importlib.util
import sys

import pytest
import torch

from adapt.template import Instance
from components.networks.heads import LinearHead
from components.networks.prompt_free_sam import PromptFreeSam
from components.pretrained import pretrained_file
from components.sam.checkpoint import CHECKPOINT_PARTS, read_sam_checkpoint
from components.sam.defaults import default_checkpoint, default_image_size
from components.sam.encoder import SamEncoder
from components.sam.sam2_encoder import SAM2_ARCHITECTURES, sam2_image_encoder

MODEL_TYPES = ["vit_tiny", "vit_t", "phantom_unet"]  # vit_b, vit_l and vit_h have vit_tiny's code
SAM2 = "sam2.1_hiera_tiny"  # the others of SAM 2.1 have its code
WITHOUT_TRANSFORMERS = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs pip install -c constraints.txt -e '.[encoders]'"
)
STRIDES = {"phantom_unet": 4, SAM2: 4}  # of the others 16
IMAGES = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32).float() % 251

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[*MODEL_TYPES, pytest.param(SAM2, marks=WITHOUT_TRANSFORMERS)])
def model_type(request) -> str:
    return request.param


def save_in_sams_layout(encoder: SamEncoder, path) -> str:
    state = encoder.image_encoder.state_dict()
    torch.save({f"image_encoder.{key}": value for key, value in state.items()}, path)
    return str(path)


def changed_encoder(model_type: str, image_size: int = 64) -> SamEncoder:
    """An encoder of other weights than the random ones that its type starts with."""
    encoder = SamEncoder(model_type, image_size=image_size)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.sin(torch.arange(parameter.numel()).view_as(parameter)))
    return encoder


def test_default_checkpoint_is_the_published_one_or_comes_with_the_package():
    assert default_checkpoint("a/models", "vit_b") == "a/models/sam_vit_b_01ec64.pth"
    assert default_checkpoint("a/models", "phantom_unet") == pretrained_file("phantom_unet.pth")
    with pytest.raises(ValueError, match="unknown model_type 'vit_x': expected one of"):
        default_checkpoint("a/models", "vit_x")


@pytest.mark.parametrize(("crop_size", "image_size"), [(176, 176), (170, 176), (256, 256), (64, 64), (47, 48)])
def test_default_image_size_is_the_crop_rounded_up_or_that_of_sams_encoders(crop_size, image_size):
    assert default_image_size("phantom_unet", crop_size) == image_size
    assert default_image_size(SAM2, crop_size) == 32 * -(-crop_size // 32)
    assert default_image_size("vit_b", crop_size) == default_image_size("vit_t", crop_size) == 1024


@pytest.mark.parametrize("image_size", [64, 160])
def test_embeddings_have_256_channels_at_the_types_stride(model_type, image_size):
    embeddings = SamEncoder(model_type, image_size=image_size)(IMAGES[:2])
    side = image_size // STRIDES.get(model_type, 16)
    assert embeddings.shape == (2, 256, side, side)
    assert not torch.equal(embeddings[0], embeddings[1])


def test_image_seen_before_is_looked_up_and_not_that_of_another_encoder(model_type, tmp_path):
    encoder = SamEncoder(model_type, image_size=64, cache_dir=str(tmp_path))
    first = encoder(IMAGES)
    other = SamEncoder(model_type, image_size=64, cache_dir=str(tmp_path))
    assert torch.equal(other(IMAGES.flip(0)), first.flip(0))
    assert (other.cache.hits, other.cache.misses) == (3, 0)
    with torch.no_grad():
        next(iter(other.image_encoder.parameters())).add_(0.1)
    assert not torch.equal(other(IMAGES), first)
    assert other.cache.misses == 3


def test_scripted_traced_and_exported_network_equals_eager(model_type):
    network = PromptFreeSam(changed_encoder(model_type), LinearHead(4), "fp32").eval()
    with torch.no_grad():
        expected = network(IMAGES)
    spread = float(expected.max() - expected.min())
    traced = torch.jit.trace(network, IMAGES, check_trace=False)
    exported = torch.export.export(network, (IMAGES,)).module()
    for other in (torch.jit.script(network), traced, exported):
        torch.testing.assert_close(other(IMAGES.flip(0)), expected.flip(0), rtol=0, atol=1e-5 * spread)


def test_bf16_is_near_fp32_and_has_embeddings_of_its_own(model_type, tmp_path):
    encoder = SamEncoder(model_type, image_size=64, cache_dir=str(tmp_path))
    expected = encoder(IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = encoder(IMAGES)
    assert embeddings.dtype == torch.float32
    assert encoder.cache.misses == 6
    assert not torch.equal(embeddings, expected)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_frozen_encoder_saves_its_fingerprint_and_a_trainable_one_its_weights_too(model_type):
    frozen = SamEncoder(model_type, image_size=64)
    assert frozen.state_dict().keys() == {"fingerprint"}
    trainable = SamEncoder(model_type, image_size=64, trainable=True)
    trainable.load_state_dict(frozen.state_dict())
    trainable(IMAGES).square().mean().backward()
    assert all(parameter.grad is not None for parameter in trainable.parameters())
    torch.optim.SGD(trainable.parameters(), lr=0.1).step()
    state = trainable.state_dict()
    assert not torch.equal(state["fingerprint"], frozen.fingerprint)
    frozen.load_state_dict(state)
    assert torch.equal(frozen.state_dict()["fingerprint"], state["fingerprint"])
    torch.testing.assert_close(frozen(IMAGES), trainable.eval()(IMAGES))


def test_exported_encoder_is_loaded_and_by_another_type_refused_by_name(model_type, tmp_path):
    encoder = changed_encoder(model_type)
    path = save_in_sams_layout(encoder, tmp_path / "encoder.pth")
    loaded = SamEncoder(model_type, path, image_size=64)
    assert torch.equal(loaded.fingerprint, encoder.state_dict()["fingerprint"])
    assert torch.equal(loaded(IMAGES), encoder(IMAGES))
    other = next(name for name in MODEL_TYPES if name != model_type)
    with pytest.raises(ValueError, match=f"is a {model_type} checkpoint, .* give --model_type {model_type}"):
        SamEncoder(other, path)


def with_prefix(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


OPTIMIZER = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}
LAYOUTS = {
    "MedSAM": lambda state: state,
    "MedSAM's training": lambda state: {"model": state, "optimizer": OPTIMIZER, "epoch": 3},
    "micro-sam's training": lambda state: {
        "model_state": with_prefix("sam.", state),
        "optimizer_state": OPTIMIZER,
        "iteration": 5,
        "init": {"logger": None},
    },
    "micro-sam's training with its own decoder": lambda state: {
        "model_state": with_prefix("sam.", state),
        "decoder_state": {"out_conv.weight": torch.ones(3, 2)},
        "optimizer_state": OPTIMIZER,
    },
    "state_dict of several GPUs": lambda state: {"state_dict": with_prefix("module.", state)},
    "model_state of several GPUs": lambda state: {"model_state": with_prefix("module.sam.", state), "epoch": 1},
}


@pytest.fixture(scope="module")
def small_vit_b(sam_vit_b) -> dict[str, torch.Tensor]:
    """The keys and shapes of a vit_b, each of one value, so that its files are small."""
    state = sam_vit_b.state_dict()
    return {key: torch.tensor(index / len(state)).expand(state[key].shape) for index, key in enumerate(state)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoint_derived_from_vit_b_is_read(layout, small_vit_b, tmp_path):
    torch.save(LAYOUTS[layout](small_vit_b), tmp_path / "derived.pth")
    parts = read_sam_checkpoint(str(tmp_path / "derived.pth"))
    received = {f"{part}.{key}": value for part in CHECKPOINT_PARTS for key, value in parts[part].items()}
    assert received.keys() == small_vit_b.keys()
    assert all(torch.equal(value, small_vit_b[key]) for key, value in received.items())


def test_checkpoint_derived_from_vit_b_becomes_that_encoder(small_vit_b, tmp_path):
    path = tmp_path / "medsam_vit_b.pth"
    torch.save(LAYOUTS["micro-sam's training with its own decoder"](small_vit_b), path)
    encoder = SamEncoder("vit_b", str(path))
    for key, value in encoder.image_encoder.state_dict().items():
        assert torch.equal(value, small_vit_b[f"image_encoder.{key}"]), key
    with pytest.raises(ValueError, match="is a vit_b checkpoint, but model_type is vit_t"):
        SamEncoder("vit_t", str(path))


def test_missing_transformers_is_said_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"SAM 2.1 need transformers 5.24 or later: pip install .*\[encoders\]"):
        SamEncoder(SAM2, image_size=64)


def test_published_files_are_known():
    for name in SAM2_ARCHITECTURES:
        assert default_checkpoint("models", name) == f"models/{name}.pt"
        entry = Instance("linearhead", cases="custom", hearts=False, model_type=name).parts
        assert entry["sam_url"].endswith(f"/{name}.pt")
        assert len(entry["sam_sha256"]) == 64


def test_weights_of_sam_are_not_taken_for_sam_2s():
    keys = ("image_encoder.neck.0.weight", "image_encoder.blocks.0.norm1.weight", "mask_decoder.iou_token.weight")
    assert sam2_image_encoder(dict.fromkeys(keys, torch.ones(1))) == {}
