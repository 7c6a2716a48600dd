"""Our attention against `segment_anything`'s, on the same random weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from components.sam.attention import RelPosAttention
from components.sam.layers import LayerNorm2d
from components.sam.segment_anything_import import import_from_segment_anything

sam_image_encoder = import_from_segment_anything("modeling.image_encoder")
sam_common = import_from_segment_anything("modeling.common")

REPOSITORY = Path(__file__).parents[1]  # not from conftest, whose import takes seconds in the process below
DIM, HEADS = 64, 4


def pair(grid: tuple[int, int]) -> tuple[torch.nn.Module, RelPosAttention]:
    """SAM's attention and ours, with the same weights."""
    torch.manual_seed(0)
    sams = sam_image_encoder.Attention(DIM, HEADS, use_rel_pos=True, input_size=grid)
    for parameter in sams.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = RelPosAttention(DIM, HEADS, use_rel_pos=True, input_size=grid)
    ours.load_state_dict(sams.state_dict())
    return sams, ours


def sams_windows(sams: torch.nn.Module, x: torch.Tensor, window_size: int) -> torch.Tensor:
    windows, padded = sam_image_encoder.window_partition(x, window_size)
    return sam_image_encoder.window_unpartition(sams(windows), window_size, padded, x.shape[1:3])


def assert_same(received: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(received, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# The larger grids are too large to be computed in one piece.
@pytest.mark.parametrize(("height", "width"), [(1, 3), (6, 10), (8, 8), (25, 24), (33, 32), (40, 50)])
def test_global_attention_is_sams_at_every_grid_size(height, width):
    sams, ours = pair((height, width))
    x = torch.randn(2, height, width, DIM)
    with torch.no_grad():
        assert_same(ours(x), sams(x))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux to measure memory")
def test_scores_of_a_whole_head_are_never_in_memory():
    # In a separate process, whose memory has no earlier peak; a first pass loads the libraries.
    script = f"""
import torch
from test_attention import pair

def peak_bytes():
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

torch.set_num_threads(1)
with torch.no_grad():
    for attention in reversed(pair((64, 64))):
        attention(torch.randn(1, 32, 32, {DIM}))
        before = peak_bytes()
        attention(torch.randn(1, 64, 64, {DIM}))
        print(peak_bytes() - before)
"""
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    ours, sams = map(int, done.stdout.split())
    bytes_of_a_head = 4 * (64 * 64) ** 2
    assert ours < bytes_of_a_head
    assert sams > HEADS * bytes_of_a_head


# The last grid is too large to be computed in one piece.
@pytest.mark.parametrize(("height", "width"), [(8, 8), (10, 7), (3, 5), (4, 9), (250, 99)])
def test_windows_are_sams_with_and_without_padding(height, width):
    sams, ours = pair((4, 4))
    x = torch.randn(2, height, width, DIM)
    assert_same(ours.attend_in_windows(x, 4), sams_windows(sams, x, 4))


def projected_tokens(attend, x: torch.Tensor) -> float:
    """The number of tokens that a pass projects, from its FLOPs: q, k, v and output are DIM x DIM matrices."""
    with FlopCounterMode(display=False) as counter:
        attend(x, 4)
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(name, 0) for name in (torch.ops.aten.mm, torch.ops.aten.addmm)) / (2 * 4 * DIM * DIM)


def test_padded_tokens_are_not_projected():
    # 5x5 tokens in windows of 4 are padded to 8x8; only 25 are real.
    sams, ours = pair((4, 4))
    x = torch.randn(1, 5, 5, DIM)
    assert projected_tokens(ours.attend_in_windows, x) <= 25
    assert projected_tokens(lambda x, size: sams_windows(sams, x, size), x) == 64


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


@pytest.mark.parametrize(("height", "width"), [(6, 6), (33, 32)])
def test_gradients_are_sams(height, width):
    sams, ours = pair((height, width))
    x = torch.randn(1, height, width, DIM)
    for module in (sams, ours):
        module(x).square().sum().backward()
    for (name, expected), received in zip(sams.named_parameters(), ours.parameters(), strict=True):
        assert expected.grad.abs().sum() > 0, name
        assert_same(received.grad, expected.grad, 1e-4)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10)])
def test_bf16_is_near_fp32_with_and_without_amx(height, width, amx, monkeypatch):
    monkeypatch.setattr(RelPosAttention, "has_amx", amx)
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
    sams, ours = sam_common.LayerNorm2d(5), LayerNorm2d(5)
    torch.nn.init.normal_(sams.weight)
    torch.nn.init.normal_(sams.bias)
    ours.load_state_dict(sams.state_dict())
    x = torch.randn(2, 5, 3, 4) * 3 + 1
    assert_same(ours(x), sams(x))
    for module in (sams, ours):
        module(x).square().sum().backward()
    assert_same(ours.weight.grad, sams.weight.grad)
