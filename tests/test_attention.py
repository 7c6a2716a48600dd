"""Our attention against `segment_anything`'s, on the same random weights."""

import pytest
import torch

from components.sam import attention
from components.sam.attention import RelPosAttention
from components.sam.layers import LayerNorm2d
from components.sam.segment_anything_import import import_from_segment_anything

image_encoder = import_from_segment_anything("modeling.image_encoder")
common = import_from_segment_anything("modeling.common")

DIM, HEADS = 64, 4


def pair(grid: tuple[int, int]) -> tuple[torch.nn.Module, RelPosAttention]:
    """The same attention twice: SAM's and ours."""
    torch.manual_seed(0)
    sams = image_encoder.Attention(DIM, HEADS, use_rel_pos=True, input_size=grid)
    for parameter in sams.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = RelPosAttention(DIM, HEADS, use_rel_pos=True, input_size=grid)
    ours.load_state_dict(sams.state_dict())
    return sams, ours


def sams_windows(sams: torch.nn.Module, x: torch.Tensor, window_size: int) -> torch.Tensor:
    windows, padded = image_encoder.window_partition(x, window_size)
    return image_encoder.window_unpartition(sams(windows), window_size, padded, x.shape[1:3])


def assert_same(received: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(received, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10), (1, 3)])
@pytest.mark.parametrize("elements", [2**20, 700, 60, 1])
def test_global_attention_is_sams_however_small_the_blocks(height, width, elements, monkeypatch):
    sams, ours = pair((height, width))
    monkeypatch.setattr(RelPosAttention, "bias_elements_cpu", elements)
    x = torch.randn(2, height, width, DIM)
    assert_same(ours(x), sams(x))


def test_bias_never_exceeds_the_limit(monkeypatch):
    # 64 tokens and a limit of 640 elements: ten query rows of one head.
    _, ours = pair((8, 8))
    monkeypatch.setattr(RelPosAttention, "bias_elements_cpu", 640)
    sizes = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask, **others):
        sizes.append(attn_mask.numel())
        return attend(*args, attn_mask=attn_mask, **others)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    ours(torch.randn(1, 8, 8, DIM))
    assert max(sizes) == 640
    assert sum(sizes) == HEADS * 64 * 64


@pytest.mark.parametrize(("height", "width"), [(8, 8), (10, 7), (3, 5), (4, 9)])
def test_windows_are_sams_with_and_without_padding(height, width):
    sams, ours = pair((4, 4))
    x = torch.randn(2, height, width, DIM)
    assert_same(ours.attend_in_windows(x, 4), sams_windows(sams, x, 4))


def test_padded_tokens_are_not_projected():
    # 5x5 tokens in windows of 4 are padded to 8x8; the projections see the 25 real ones.
    _, ours = pair((4, 4))
    counts = []
    for projection in (ours.qkv, ours.proj):
        projection.register_forward_hook(lambda _module, args, _output: counts.append(args[0].numel() // DIM))
    ours.attend_in_windows(torch.randn(1, 5, 5, DIM), 4)
    assert counts == [25, 25]


def test_relative_positions_of_another_grid_are_interpolated_as_sams_are():
    sams, ours = pair((8, 8))
    x = torch.randn(1, 5, 5, DIM)
    assert_same(ours(x), sams(x))


def test_loaded_weights_count_at_once():
    sams, ours = pair((6, 6))
    x = torch.randn(1, 6, 6, DIM)
    before = ours(x)
    with torch.no_grad():
        sams.rel_pos_h.mul_(3)
    ours.load_state_dict(sams.state_dict())
    assert not torch.allclose(ours(x), before)
    assert_same(ours(x), sams(x))


def test_gradients_are_sams():
    sams, ours = pair((6, 6))
    x = torch.randn(1, 6, 6, DIM)
    for module in (sams, ours):
        module(x).square().sum().backward()
    for (name, expected), received in zip(sams.named_parameters(), ours.parameters(), strict=True):
        assert expected.grad.abs().sum() > 0, name
        assert_same(received.grad, expected.grad, 1e-4)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10)])
def test_bf16_is_near_fp32(height, width):
    # bf16 keeps 8 bits: an error of about 1/256 of the values, growing over a few products.
    sams, ours = pair((height, width))
    x = torch.randn(1, height, width, DIM)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        globally, in_windows = ours(x), ours.attend_in_windows(x, 4)
    assert globally.dtype == torch.bfloat16
    assert_same(globally.float(), sams(x), 0.03)
    assert_same(in_windows.float(), sams_windows(sams, x, 4), 0.03)


def test_layer_norm_is_sams_with_its_gradients():
    torch.manual_seed(0)
    sams, ours = common.LayerNorm2d(5), LayerNorm2d(5)
    torch.nn.init.normal_(sams.weight)
    torch.nn.init.normal_(sams.bias)
    ours.load_state_dict(sams.state_dict())
    x = torch.randn(2, 5, 3, 4) * 3 + 1
    assert_same(ours(x), sams(x))
    for module in (sams, ours):
        module(x).square().sum().backward()
    assert_same(ours.weight.grad, sams.weight.grad)


def test_windows_in_strips_are_sams(monkeypatch):
    sams, ours = pair((4, 4))
    x = torch.randn(2, 10, 9, DIM)
    monkeypatch.setattr(attention, "rows_at_a_time", lambda _x, _channels: 5)  # one row of windows
    assert_same(ours.attend_in_windows(x, 4), sams_windows(sams, x, 4))
