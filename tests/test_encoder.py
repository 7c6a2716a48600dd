import copy
import logging
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import REPOSITORY, randomise_positions
from torch import nn

from components.sam.encoder import SamEncoder, fingerprint
from components.sam.image_encoder import ARCHITECTURES, ImageEncoder
from components.sam.segment_anything_import import import_from_segment_anything

PIXEL_MEAN = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
PIXEL_STD = torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)


def build_sam_tiny() -> nn.Module:
    """A complete SAM with the tiny encoder, built from `segment_anything`'s classes only."""
    sam = import_from_segment_anything("build_sam").build_sam_vit_b()
    tiny = ARCHITECTURES["vit_tiny"]
    sam.image_encoder = import_from_segment_anything("modeling.image_encoder").ImageEncoderViT(
        img_size=tiny.native_size,
        embed_dim=tiny.embed_dim,
        depth=tiny.depth,
        num_heads=tiny.num_heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=tiny.global_attn_indexes,
    )
    randomise_positions(sam.image_encoder)
    return sam


@pytest.fixture(scope="module")
def sam_tiny() -> nn.Module:
    torch.manual_seed(1)
    return build_sam_tiny()


@pytest.fixture(scope="module")
def tiny_checkpoint(sam_tiny, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny") / "sam_vit_tiny.pth"
    torch.save(sam_tiny.state_dict(), path)
    return str(path)


def save_changed(checkpoint: str, folder, change) -> str:
    state = torch.load(checkpoint, weights_only=True)
    change(state)
    path = folder / "changed.pth"
    torch.save(state, path)
    return str(path)


def positions_for(sams: nn.Module, image_size: int) -> torch.Tensor:
    """The positions of SAM's encoder, which takes one image size only, interpolated to the grid of another."""
    side = image_size // 16
    native = sams.pos_embed.detach().permute(0, 3, 1, 2)
    return nn.functional.interpolate(native, (side, side), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


@pytest.mark.parametrize("image_size", [256, pytest.param(1024, marks=pytest.mark.slow)])
def test_vit_b_equals_segment_anything(sam_vit_b, sam_checkpoint, image_size):
    images = torch.rand(1, 3, image_size, image_size) * 255
    encoder = SamEncoder("vit_b", sam_checkpoint, image_size=image_size)
    sams = sam_vit_b.image_encoder
    positions = sams.pos_embed if image_size == 1024 else positions_for(sams, image_size)
    with torch.no_grad():
        expected = torch.func.functional_call(sams, {"pos_embed": positions}, (images - PIXEL_MEAN) / PIXEL_STD)
    torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_vit_tiny_equals_segment_anything(sam_tiny, tiny_checkpoint):
    images = torch.rand(2, 3, 256, 256) * 255
    encoder = SamEncoder("vit_tiny", tiny_checkpoint, image_size=256)
    with torch.no_grad():
        expected = sam_tiny.image_encoder((images - PIXEL_MEAN) / PIXEL_STD)
    torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("model_type", "millions"), [("vit_b", 89.67), ("vit_l", 308.28), ("vit_h", 637.03)])
def test_parameter_counts_are_sams(model_type, millions):
    with torch.device("meta"):
        encoder = ImageEncoder(ARCHITECTURES[model_type])
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("image_size", [128, 256, 320])
@pytest.mark.parametrize("size_hw", [(256, 256), (100, 300)])
def test_embeddings_are_a_sixteenth_of_the_image_size_for_any_input(image_size, size_hw):
    encoder = SamEncoder("vit_tiny", image_size=image_size)
    embeddings = encoder(torch.rand(1, 3, *size_hw) * 255)
    assert embeddings.shape == (1, 256, image_size // 16, image_size // 16)


def test_constant_pixel_mean_becomes_zero():
    encoder = SamEncoder("vit_tiny", image_size=64)
    assert encoder.preprocess(PIXEL_MEAN.expand(1, 3, 32, 32)).abs().max() < 1e-5


def test_weights_and_fingerprint_do_not_depend_on_the_image_size(tiny_checkpoint):
    encoder = SamEncoder("vit_tiny", tiny_checkpoint, image_size=320)
    native = SamEncoder("vit_tiny", tiny_checkpoint, image_size=256)
    assert torch.equal(native.fingerprint, encoder.fingerprint)
    for key, value in native.image_encoder.state_dict().items():
        assert torch.equal(value, encoder.image_encoder.state_dict()[key]), key


def test_interpolated_positions_keep_left_from_right(sam_tiny, tiny_checkpoint):
    # Within a blank image only positions differ. The reference is SAM's encoder with positions of the larger grid.
    blank = torch.full((1, 3, 320, 320), 100.0)
    embedding = SamEncoder("vit_tiny", tiny_checkpoint, image_size=320)(blank)
    assert embedding.std(dim=(2, 3)).mean() > 0.01

    sams = copy.deepcopy(sam_tiny.image_encoder)
    positions = positions_for(sams, 320)
    tolerance = 1e-5 * float(embedding.abs().max())
    for given, same in ((positions, True), (positions.flip(2), False), (positions.transpose(1, 2), False)):
        sams.pos_embed = nn.Parameter(given)
        with torch.no_grad():
            expected = sams((blank - PIXEL_MEAN) / PIXEL_STD)
        assert torch.allclose(embedding, expected, rtol=0, atol=tolerance) == same


def test_frozen_encoder_stays_in_eval_mode_without_gradients():
    encoder = SamEncoder("vit_tiny", image_size=64).train()
    assert encoder.training
    assert not encoder.image_encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(torch.rand(1, 3, 64, 64)).requires_grad


def test_trainable_encoder_learns_and_follows_train_and_eval():
    encoder = SamEncoder("vit_tiny", image_size=64, trainable=True).train()
    assert encoder.image_encoder.training
    encoder(torch.rand(1, 3, 64, 64) * 255).square().mean().backward()
    assert all(p.grad is not None for p in encoder.image_encoder.parameters())
    assert not encoder.eval().image_encoder.training


@pytest.mark.parametrize(
    ("model_type", "neck"), [("vit_tiny", ("neck",)), ("vit_t", ("neck",)), ("phantom_unet", ("up_4", "neck"))]
)
def test_of_an_encoder_with_a_trainable_neck_only_that_learns_and_a_frozen_one_takes_it_over(model_type, neck):
    encoder = SamEncoder(model_type, image_size=64, trainable="neck").train()
    parts = {name: part for name, part in encoder.image_encoder.named_children() if name in neck}
    assert parts.keys() == set(neck)
    in_neck = {id(module) for part in parts.values() for module in part.modules()}
    assert {id(module) for module in encoder.image_encoder.modules() if module.training} == in_neck
    before = {key: value.clone() for key, value in encoder.image_encoder.state_dict().items()}
    encoder(torch.rand(2, 3, 64, 64) * 255).square().mean().backward()
    torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=1.0).step()
    changed = {key for key, value in encoder.image_encoder.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.partition(".")[0] for key in changed} == set(neck)

    frozen = SamEncoder(model_type, image_size=64)
    frozen.load_state_dict(encoder.state_dict())
    image = torch.rand(1, 3, 64, 64) * 255
    with torch.no_grad():
        assert torch.allclose(frozen(image), encoder.eval()(image), atol=1e-4)


def test_random_weights_are_the_same_for_every_seed_and_leave_the_generator_alone(caplog):
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING):
        first = SamEncoder("vit_tiny")
    after = torch.rand(1)
    assert "RANDOM" in caplog.text
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    assert torch.equal(first.fingerprint, SamEncoder("vit_tiny").fingerprint)


@pytest.mark.parametrize("fused", [False, True])
def test_fingerprint_of_a_trained_encoder_follows_any_optimizer(fused):
    encoder = SamEncoder("vit_tiny", image_size=64, trainable=True)
    before = encoder.state_dict()["fingerprint"].clone()
    optimizer = torch.optim.AdamW(
        encoder.parameters(), fused=fused
    )  # a fused one does not increment the tensors' versions
    encoder(torch.rand(1, 3, 64, 64) * 255).sum().backward()
    optimizer.step()
    state = encoder.state_dict()
    assert not torch.equal(state["fingerprint"], before)
    SamEncoder("vit_tiny", image_size=64, trainable=True).load_state_dict(state)


def in_bf16(encoder: SamEncoder, images: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return encoder(images)


def test_bf16_embeddings_follow_weights_that_change_and_fingerprint_and_state_stay_those_of_fp32():
    images = torch.rand(1, 3, 64, 64) * 255
    encoder = SamEncoder("vit_tiny", image_size=64)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    first = in_bf16(encoder, images)
    assert torch.equal(encoder.state_dict()["fingerprint"], before["fingerprint"])
    assert encoder.state_dict().keys() == before.keys()
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}
    with torch.no_grad():
        encoder.image_encoder.blocks[0].mlp.lin1.weight.mul_(2)
    changed = in_bf16(encoder, images)
    assert not torch.equal(changed, first)
    expected = encoder(images)
    torch.testing.assert_close(changed, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_fingerprint_changes_with_any_weight_name_or_shape():
    state = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    reference = fingerprint(state)
    assert reference.shape == (32,)
    assert torch.equal(reference, fingerprint(dict(reversed(state.items()))))
    assert not torch.equal(reference, fingerprint({**state, "b": torch.ones(1) + 1e-6}))
    assert not torch.equal(reference, fingerprint({"a": state["a"].view(3, 2), "b": state["b"]}))
    assert not torch.equal(reference, fingerprint({"c": state["a"], "b": state["b"]}))


def test_unknown_model_type_and_image_size_are_refused():
    with pytest.raises(ValueError, match=r"unknown model_type 'vit_x': expected one of vit_b, vit_l, vit_h, vit_tiny"):
        SamEncoder("vit_x")
    with pytest.raises(ValueError, match="multiple of 16, received 250"):
        SamEncoder("vit_tiny", image_size=250)


def test_missing_checkpoint_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="download_large_files"):
        SamEncoder("vit_b", str(tmp_path / "nowhere.pth"))


def test_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "text.pth"
    path.write_text("not a checkpoint")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        SamEncoder("vit_tiny", str(path))


def test_checkpoint_of_another_model_type_is_named(tiny_checkpoint):
    with pytest.raises(ValueError, match=r"is a vit_tiny checkpoint.* give --model_type vit_tiny"):
        SamEncoder("vit_b", tiny_checkpoint)


def test_missing_key_is_named(tiny_checkpoint, tmp_path):
    path = save_changed(tiny_checkpoint, tmp_path, lambda state: state.pop("image_encoder.neck.0.weight"))
    with pytest.raises(ValueError, match=r"missing: image_encoder\.neck\.0\.weight"):
        SamEncoder("vit_tiny", path)


def test_extra_keys_are_named(tiny_checkpoint, tmp_path):
    path = save_changed(tiny_checkpoint, tmp_path, lambda state: state.update({"image_encoder.extra": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"extra: image_encoder\.extra"):
        SamEncoder("vit_tiny", path)
    path = save_changed(tiny_checkpoint, tmp_path, lambda state: state.update({"stranger": torch.ones(1)}))
    with pytest.raises(ValueError, match="received also stranger"):
        SamEncoder("vit_tiny", path)


def test_misshapen_key_is_named(tiny_checkpoint, tmp_path):
    key = "image_encoder.patch_embed.proj.bias"
    path = save_changed(tiny_checkpoint, tmp_path, lambda state: state.update({key: torch.ones(5)}))
    with pytest.raises(ValueError, match=r"misshapen: image_encoder.patch_embed.proj.bias \(expected \(192,\)"):
        SamEncoder("vit_tiny", path)


TORCHVISION = {
    "working": {
        "__init__.py": "",
        "ops/boxes.py": "batched_nms = box_area = None",
        "transforms/functional.py": "resize = to_pil_image = None",
    },
    "broken": {"__init__.py": "raise RuntimeError('operator torchvision::nms does not exist')"},
    "absent": {"__init__.py": "raise ModuleNotFoundError(\"No module named 'torchvision'\")"},
}


@pytest.mark.parametrize("torchvision", TORCHVISION)
def test_ordinary_import_of_segment_anything_finds_the_same_modules_later(torchvision, tmp_path):
    # In a separate process; the stub hides a torchvision that may be installed.
    for name, content in TORCHVISION[torchvision].items():
        path = tmp_path / "torchvision" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    script = f"""
import sys
from components.sam.image_encoder import ImageEncoder
from components.sam.segment_anything_import import import_from_segment_anything
ours = import_from_segment_anything("modeling.image_encoder")
assert ours.__name__ == "segment_anything.modeling.image_encoder"
assert "segment_anything" not in sys.modules
try:
    import segment_anything
except Exception as error:
    assert "torchvision" in str(error), error
    assert {torchvision != "working"}
else:
    assert {torchvision == "working"}
    from segment_anything.modeling.image_encoder import ImageEncoderViT
    assert issubclass(ImageEncoder, ImageEncoderViT)
    assert segment_anything.build_sam_vit_b.__globals__["ImageEncoderViT"] is ImageEncoderViT
assert import_from_segment_anything("modeling.image_encoder") is ours
assert import_from_segment_anything("modeling.sam").ImageEncoderViT is ours.ImageEncoderViT
"""
    path = os.pathsep.join(map(str, (tmp_path, REPOSITORY)))
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
