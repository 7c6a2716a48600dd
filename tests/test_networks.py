import copy
import importlib.util
import logging

import pytest
import torch
from monai.handlers import CheckpointLoader, CheckpointSaver
from monai.networks.utils import copy_model_state
from torch import nn

from components.base import precision as precision_module
from components.base.weights import RANDOM_WEIGHTS_SEED
from components.networks.heads import CNNHead, LinearHead
from components.networks.prompt_free_sam import PromptFreeSam
from components.sam.encoder import SamEncoder

IMAGES = torch.arange(2 * 3 * 64 * 64).view(2, 3, 64, 64).float() % 255


def build(
    trainable: bool = False,
    *,
    other_encoder: bool = False,
    image_size: int = 64,
    head: nn.Module | None = None,
    start_checkpoint: str | None = None,
) -> PromptFreeSam:
    encoder = SamEncoder("vit_tiny", image_size=image_size, trainable=trainable)
    if other_encoder:
        state = SamEncoder("vit_tiny", trainable=True).state_dict()
        del state["fingerprint"]
        state["image_encoder.neck.0.weight"] = state["image_encoder.neck.0.weight"] + 0.1
        encoder.load_state_dict(state)
    head = LinearHead(4) if head is None else head
    return PromptFreeSam(encoder, head, precision="fp32", start_checkpoint=start_checkpoint)


def head_differs(first: nn.Module, second: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("image_size", [64, 256])
def test_logits_have_the_images_size(image_size):
    assert build(image_size=image_size)(IMAGES).shape == (2, 4, 64, 64)


def test_scripted_network_equals_eager_and_carries_the_encoder():
    network = build()
    scripted = torch.jit.script(network)
    torch.testing.assert_close(scripted(IMAGES), network(IMAGES))
    assert "encoder.image_encoder.pos_embed" in scripted.state_dict()
    assert "encoder.image_encoder.pos_embed" not in network.state_dict()


@pytest.mark.parametrize("trainable", [False, True])
def test_bf16_gives_fp32_logits_near_those_of_fp32_and_trains_fp32_weights(trainable):
    network = build(trainable)
    expected = network(IMAGES)
    network.precision = "bf16"
    logits = network(IMAGES)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 * float(expected.detach().abs().max()))
    logits.square().mean().backward()
    assert {p.grad.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_bf16_is_used_where_asked_for_and_by_auto_only_where_native(precision, native, monkeypatch):
    reduced = {"fp32": False, "bf16": True, "auto": native}[precision]
    network = build()
    expected = network(IMAGES)
    network.precision = precision
    monkeypatch.setattr(precision_module, "has_native_bf16", lambda _device_type: native)
    monkeypatch.setattr(precision_module, "_bf16_is_faster", lambda: True)
    assert torch.equal(network(IMAGES), expected) != reduced


def test_forced_bf16_says_so_once_where_it_is_emulated(caplog):
    spec = importlib.util.find_spec("components.base.precision")
    module = importlib.util.module_from_spec(spec)  # anew, since another test may have been told already
    spec.loader.exec_module(module)
    module.has_native_bf16 = lambda _device_type: False
    module.autocast_to("bf16", "cpu")
    module.autocast_to("bf16", "cpu")
    assert caplog.text.count("emulation") == 1


def test_products_in_fp32_round_nothing_whatever_library_makes_them():
    matrix = 1 + torch.rand(256, 768, generator=torch.Generator().manual_seed(0))  # few of them are bf16 numbers
    batch = matrix.view(4, 64, 768)
    with torch.no_grad(), precision_module.autocast_to("fp32", "cpu"):
        assert torch.equal(matrix @ torch.eye(768), matrix)
        assert torch.equal(torch.eye(256) @ matrix, matrix)
        assert torch.equal(nn.functional.linear(matrix, torch.eye(768), torch.zeros(768)), matrix)
        assert torch.equal(batch @ torch.eye(768).expand(4, -1, -1), batch)
        assert torch.equal(torch.baddbmm(torch.zeros(4, 64, 768), torch.eye(64).expand(4, -1, -1), batch), batch)


def test_what_products_outside_a_network_may_round_to_stays_as_it_was():
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    with precision_module.autocast_to("fp32", "cpu"):
        pass
    assert switch.fp32_precision == before
    with pytest.raises(ValueError, match="inside"), precision_module.autocast_to("fp32", "cpu"):
        raise ValueError("inside")
    assert switch.fp32_precision == before


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="unknown precision 'half': expected one of auto, fp32, bf16"):
        PromptFreeSam(SamEncoder("vit_tiny", image_size=64), LinearHead(4), precision="half")


def test_frozen_checkpoint_holds_head_and_fingerprint_only():
    keys = build().state_dict().keys()
    assert {key for key in keys if key.startswith("encoder.")} == {"encoder.fingerprint"}
    assert {key for key in keys if key.startswith("head.")} == {f"head.{key}" for key in LinearHead(4).state_dict()}


def test_trainable_checkpoint_holds_everything_with_the_fingerprint_of_now():
    network = build(trainable=True)
    before = network.state_dict()["encoder.fingerprint"].clone()
    with torch.no_grad():
        network.encoder.image_encoder.pos_embed.add_(1)
    state = network.state_dict()
    assert "encoder.image_encoder.pos_embed" in state
    assert not torch.equal(before, state["encoder.fingerprint"])
    fresh = build(trainable=True)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(IMAGES), network(IMAGES))


def test_head_goes_to_another_network_of_the_same_encoder_at_any_image_size():
    trained, fresh = build(), build(image_size=128)
    assert head_differs(trained.head, fresh.head)
    fresh.load_state_dict(trained.state_dict())
    assert not head_differs(trained.head, fresh.head)


def test_head_of_another_encoder_is_refused_and_nothing_is_loaded():
    network = build(other_encoder=True)
    before = copy.deepcopy(network.head.state_dict())
    with pytest.raises(RuntimeError, match=r"fingerprint \w+ is not \w+, that of the vit_tiny encoder in use"):
        network.load_state_dict(build().state_dict())
    assert all(torch.equal(value, network.head.state_dict()[key]) for key, value in before.items())


def test_head_starts_ft_all_on_the_same_encoder_only():
    state = build().state_dict()
    build(trainable=True).load_state_dict(state)
    with pytest.raises(RuntimeError, match="fingerprint"):
        build(trainable=True, other_encoder=True).load_state_dict(state)


def test_missing_head_key_and_missing_fingerprint_are_named():
    state = build().state_dict()
    without_head_key = {key: value for key, value in state.items() if key != "head.0.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*head\.0\.weight"):
        build().load_state_dict(without_head_key)
    without_fingerprint = {key: value for key, value in state.items() if key != "encoder.fingerprint"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*encoder\.fingerprint"):
        build().load_state_dict(without_fingerprint)


def test_frozen_network_takes_a_full_checkpoint_and_describes_the_encoder_it_took():
    full = build(trainable=True, other_encoder=True)
    frozen = build()
    frozen.load_state_dict(full.state_dict())
    torch.testing.assert_close(frozen(IMAGES), full(IMAGES))
    assert torch.equal(frozen.state_dict()["encoder.fingerprint"], full.state_dict()["encoder.fingerprint"])


def test_full_checkpoint_that_misdescribes_its_encoder_is_refused():
    state = build(trainable=True).state_dict()
    state["encoder.image_encoder.pos_embed"] = state["encoder.image_encoder.pos_embed"] + 1
    with pytest.raises(RuntimeError, match="the checkpoint is damaged"):
        build().load_state_dict(state)


def test_encoder_changed_in_place_is_another_encoder():
    state = build().state_dict()
    network = build()
    with torch.no_grad():
        network.encoder.image_encoder.pos_embed.add_(1)
    with pytest.raises(RuntimeError, match="fingerprint"):
        network.load_state_dict(state)
    assert not torch.equal(network.state_dict()["encoder.fingerprint"], state["encoder.fingerprint"])


def test_head_fits_the_same_encoder_in_half_precision():
    state = build().state_dict()
    half = build().half()
    half.load_state_dict(state)
    assert torch.equal(half.state_dict()["encoder.fingerprint"], state["encoder.fingerprint"])


def test_encoder_in_part_is_refused_even_when_not_strict():
    state = build(trainable=True).state_dict()
    del state["encoder.image_encoder.pos_embed"]
    with pytest.raises(RuntimeError, match=r"only in part; missing: encoder\.image_encoder\.pos_embed"):
        build().load_state_dict(state, strict=False)


def test_monai_saver_and_loader_and_copy_model_state(tmp_path):
    trained, fresh = build(), build()
    CheckpointSaver(str(tmp_path), {"model": trained}, save_final=True, final_filename="model.pt").completed(_engine())
    assert (tmp_path / "model.pt").stat().st_size < 400_000
    CheckpointLoader(str(tmp_path / "model.pt"), {"model": fresh})(_engine())
    assert not head_differs(trained.head, fresh.head)
    other = build(other_encoder=True)
    with pytest.raises(RuntimeError, match="fingerprint"):
        CheckpointLoader(str(tmp_path / "model.pt"), {"model": other})(_engine())
    with pytest.raises(RuntimeError, match="fingerprint"):
        copy_model_state(other, torch.load(tmp_path / "model.pt", weights_only=True))
    copied = build()
    copy_model_state(copied, torch.load(tmp_path / "model.pt", weights_only=True))
    assert not head_differs(trained.head, copied.head)


def test_distributed_data_parallel_saves_and_checks_the_same(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(build())
        state = wrapped.state_dict()
        assert {key for key in state if "encoder" in key} == {"module.encoder.fingerprint"}
        nn.parallel.DistributedDataParallel(build()).load_state_dict(state)
        with pytest.raises(RuntimeError, match="fingerprint"):
            nn.parallel.DistributedDataParallel(build(other_encoder=True)).load_state_dict(state)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def start_checkpoint(tmp_path) -> str:
    """The `model.pt` of another run."""
    torch.save(build().state_dict(), tmp_path / "model.pt")
    return str(tmp_path / "model.pt")


@pytest.mark.parametrize("trainable", [False, True])
def test_network_starts_from_a_start_checkpoint_and_says_so(start_checkpoint, trainable, caplog):
    state = torch.load(start_checkpoint, weights_only=True)
    with caplog.at_level(logging.INFO):
        network = build(trainable, start_checkpoint=start_checkpoint)
    assert f"the network starts from {start_checkpoint}" in caplog.text
    assert all(torch.equal(value, state[f"head.{key}"]) for key, value in network.head.state_dict().items())
    assert not head_differs(network.encoder, build().encoder)


def test_start_checkpoint_in_half_precision_fills_fp32_weights(start_checkpoint):
    state = torch.load(start_checkpoint, weights_only=True)
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save(halves, start_checkpoint)
    network = build(start_checkpoint=start_checkpoint)
    assert all(torch.equal(value, halves[f"head.{key}"].float()) for key, value in network.head.state_dict().items())
    assert {value.dtype for value in network.head.state_dict().values()} == {torch.float32}


def test_whatever_is_loaded_later_wins_over_the_start_checkpoint(start_checkpoint):
    network, later = build(start_checkpoint=start_checkpoint), build()
    network.load_state_dict(later.state_dict())
    assert not head_differs(network.head, later.head)


def test_start_checkpoint_that_is_missing_or_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no start checkpoint at .*none\.pt: give --start_checkpoint"):
        build(start_checkpoint=str(tmp_path / "none.pt"))
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"broken\.pt is not a readable checkpoint"):
        build(start_checkpoint=str(tmp_path / "broken.pt"))
    torch.save({"model": {}, "epoch": 3}, tmp_path / "checkpoint_epoch=3.pt")
    with pytest.raises(ValueError, match=r"epoch=3\.pt is not a start checkpoint: expected a flat state dict"):
        build(start_checkpoint=str(tmp_path / "checkpoint_epoch=3.pt"))


@pytest.mark.parametrize("head", [CNNHead(4, depth=2), LinearHead(3)], ids=["other head", "other classes"])
def test_start_checkpoint_of_another_head_is_refused(start_checkpoint, head):
    with pytest.raises(ValueError, match=r"(?s)model\.pt does not fit this network: give --start_checkpoint.*head\."):
        build(head=head, start_checkpoint=start_checkpoint)


@pytest.mark.parametrize("trainable", [False, True])
def test_start_checkpoint_of_another_encoder_is_refused(start_checkpoint, trainable):
    with pytest.raises(ValueError, match=r"does not fit this network.*fingerprint \w+ is not \w+"):
        build(trainable, other_encoder=True, start_checkpoint=start_checkpoint)


def test_copied_network_keeps_its_identity_checks():
    network = copy.deepcopy(build())
    assert "encoder.image_encoder.pos_embed" not in network.state_dict()
    with pytest.raises(RuntimeError, match="fingerprint"):
        network.load_state_dict(build(other_encoder=True).state_dict())


def test_random_encoder_seed_is_not_the_heads():
    torch.manual_seed(RANDOM_WEIGHTS_SEED)
    first = build()
    torch.manual_seed(RANDOM_WEIGHTS_SEED + 1)
    second = build()
    assert head_differs(first.head, second.head)
    assert not head_differs(first.encoder, second.encoder)


def _engine():
    from ignite.engine import Engine

    engine = Engine(lambda _engine, _batch: None)
    engine.state.max_epochs = 1
    return engine
