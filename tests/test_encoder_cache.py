"""The frozen encoder's embedding cache, through the encoder and the network."""

import copy

import pytest
import torch

from components.networks.heads import LinearHead
from components.networks.prompt_free_sam import PromptFreeSam
from components.sam.encoder import SamEncoder

IMAGES = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32).float() % 251


def cached(folder, **others) -> SamEncoder:
    return SamEncoder("vit_tiny", image_size=64, cache_dir=str(folder), **others)


def count_encoded(encoder: SamEncoder) -> list[int]:
    """A list to which each later pass through the image encoder appends its number of images."""
    counts: list[int] = []
    encoder.image_encoder.register_forward_hook(lambda _module, args, _output: counts.append(len(args[0])))
    return counts


def test_image_seen_before_is_looked_up_bit_for_bit(tmp_path):
    encoder = cached(tmp_path)
    counts = count_encoded(encoder)
    first = encoder(IMAGES)
    assert torch.equal(encoder(IMAGES), first)
    assert torch.equal(encoder(IMAGES[[2, 0]]), first[[2, 0]])
    assert sum(counts) == 3
    assert (encoder.cache.hits, encoder.cache.misses) == (5, 3)
    other = cached(tmp_path)
    assert torch.equal(other(IMAGES), first)
    assert (other.cache.hits, other.cache.misses) == (3, 0)


def test_only_new_images_of_a_batch_are_encoded_and_each_once(tmp_path):
    encoder = cached(tmp_path)
    encoder(IMAGES[:1])
    counts = count_encoded(encoder)
    embeddings = encoder(IMAGES[[1, 0, 1, 2, 2]])
    assert sum(counts) == 2
    assert torch.equal(embeddings[0], embeddings[2])
    assert not torch.equal(embeddings[0], embeddings[3])


def test_half_precision_storage_rounds_and_full_precision_storage_does_not(tmp_path):
    plain = SamEncoder("vit_tiny", image_size=64)(IMAGES)
    half = cached(tmp_path / "half")(IMAGES)
    assert half.dtype == torch.float32
    assert torch.equal(half, plain.half().float())
    assert torch.equal(cached(tmp_path / "full", cache_dtype="float32")(IMAGES), plain)


def test_other_weights_size_or_precision_never_meet(tmp_path):
    encoder = cached(tmp_path)
    encoder(IMAGES)
    with torch.no_grad():
        encoder.image_encoder.pos_embed.add_(1)
    encoder(IMAGES)
    assert encoder.cache.misses == 6
    larger = SamEncoder("vit_tiny", image_size=80, cache_dir=str(tmp_path))
    assert larger(IMAGES).shape[2:] == (5, 5)
    assert larger.cache.misses == 3
    reduced = cached(tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced(IMAGES)
    assert reduced.cache.misses == 3


def test_weights_loaded_later_count(tmp_path):
    encoder = cached(tmp_path)
    encoder(IMAGES)
    state = SamEncoder("vit_tiny", image_size=64, trainable=True).state_dict()
    del state["fingerprint"]
    state["image_encoder.neck.0.weight"] = state["image_encoder.neck.0.weight"] + 0.1
    encoder.load_state_dict(state)
    embeddings = encoder(IMAGES)
    assert encoder.cache.misses == 6
    fresh = SamEncoder("vit_tiny", image_size=64)
    fresh.load_state_dict(state)
    assert torch.equal(embeddings, fresh(IMAGES).half().float())


def test_trainable_encoder_refuses_a_cache(tmp_path):
    with pytest.raises(ValueError, match=r"change with every step.*--cache_dir"):
        cached(tmp_path, trainable=True)


def test_changed_embeddings_of_a_caller_do_not_reach_the_cache(tmp_path):
    encoder = cached(tmp_path)
    expected = encoder(IMAGES).clone()
    encoder(IMAGES).zero_()
    assert torch.equal(encoder(IMAGES), expected)


def test_scripting_tracing_and_export_pass_the_cache_by(tmp_path):
    encoder = cached(tmp_path / "cache")
    encoder.image_encoder = torch.nn.Conv2d(3, 4, 16, stride=16).requires_grad_(False)  # compiled in no time
    expected = encoder._encode(IMAGES)
    scripted = torch.jit.script(encoder)
    traced = torch.jit.trace(encoder, IMAGES, check_trace=False)
    exported = torch.export.export(encoder, (IMAGES,)).module()
    for other in (scripted, traced, exported):
        torch.testing.assert_close(other(IMAGES.flip(0)), expected.flip(0))
    assert (encoder.cache.hits, encoder.cache.misses) == (0, 0)
    assert not (tmp_path / "cache").exists()


def test_copied_network_uses_the_same_cache(tmp_path):
    network = PromptFreeSam(cached(tmp_path), LinearHead(4))
    expected = network(IMAGES)
    copied = copy.deepcopy(network)
    assert torch.equal(copied(IMAGES), expected)
    assert copied.encoder.cache.misses == 0


def test_half_precision_weights_pass_the_cache_by(tmp_path):
    # The fingerprint is still that of the fp32 weights, so it must not be used as a key.
    encoder = cached(tmp_path).half()
    assert encoder(IMAGES.half()).dtype == torch.float16
    assert (encoder.cache.hits, encoder.cache.misses) == (0, 0)


def test_head_trains_on_looked_up_embeddings(tmp_path):
    network = PromptFreeSam(cached(tmp_path), LinearHead(4))
    for _ in range(2):
        network(IMAGES).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.head.parameters())


def test_blank_image_is_encoded_once_without_a_cache():
    encoder = SamEncoder("vit_tiny", image_size=64)
    counts = count_encoded(encoder)
    blank = torch.zeros(1, 3, 32, 32)
    together = encoder(torch.cat([blank, IMAGES[:1], blank]))
    assert torch.equal(together[0], together[2])
    assert torch.equal(encoder(torch.cat([IMAGES[:1], blank]))[1], together[0])
    assert sum(counts) == 2 + 1
    torch.testing.assert_close(encoder(blank + 9), SamEncoder("vit_tiny", image_size=64)(blank + 9))
    assert sum(counts) == 4


def test_embedding_of_a_blank_image_does_not_outlive_the_weights():
    encoder = SamEncoder("vit_tiny", image_size=64)
    blank = torch.zeros(1, 3, 32, 32)
    before = encoder(blank)
    with torch.no_grad():
        encoder.image_encoder.pos_embed.add_(1)
    assert not torch.equal(encoder(blank), before)


def test_large_batch_on_a_cpu_is_encoded_in_parts():
    # Four images of 256x256 have as many pixels as one of 512x512.
    encoder = SamEncoder("vit_tiny", image_size=256)
    counts = count_encoded(encoder)
    encoder(torch.rand(6, 3, 16, 16))
    assert counts == [4, 2]
