"""SAM's attention with decomposed relative positions, with less memory and without work on padding."""

import math
from typing import Final

import torch
import torch.nn.functional as F

from components.base.precision import has_amx
from components.sam.segment_anything_import import import_from_segment_anything

sam_image_encoder = import_from_segment_anything("modeling.image_encoder")


class RelPosAttention(sam_image_encoder.Attention):  # type: ignore[name-defined]
    """Multi-head self-attention with decomposed relative positions.

    Source: `Attention` of `segment_anything/modeling/image_encoder.py`, with the same parameters. Differs: the numbers
    are the same, but they are computed block by block, so that neither the scores nor the bias of all heads are in
    memory at once. In windows, padded tokens are not projected: their queries, keys and values are the bias of the
    projection.
    """

    # Scores in memory at a time: on a CPU about as many as its L2 cache holds, on a GPU enough to occupy it.
    block_elements_cpu: Final[int] = 2**18
    block_elements_gpu: Final[int] = 2**26
    tile_dims: Final[int] = 32  # side of a tile of AMX, a CPU's unit for bf16 matrices
    has_amx: Final[bool] = has_amx()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend globally.

        Args:
            x: tokens BxHxWxC.

        Returns:
            tokens BxHxWxC.
        """
        return self._attend_in_strip(x, x.shape[1], x.shape[2])

    def attend_in_windows(self, x: torch.Tensor, window_size: int) -> torch.Tensor:
        """Attend within windows that tile the grid from its top left corner.

        Args:
            x: tokens BxHxWxC.
            window_size: side of a window in tokens; beyond the grid, windows contain padded tokens.

        Returns:
            tokens BxHxWxC.
        """
        rows_of_windows = max(1, rows_at_a_time(x, 3 * x.shape[3]) // window_size)
        strips = x.split(rows_of_windows * window_size, dim=1)
        return concatenate([self._attend_in_strip(strip, window_size, window_size) for strip in strips], dim=1)

    def _attend_in_strip(self, x: torch.Tensor, window_height: int, window_width: int) -> torch.Tensor:
        """Attend within the windows of a strip of the grid; see `attend_in_windows`."""
        batch, height, width, channels = x.shape
        rows, columns = -(-height // window_height), -(-width // window_width)
        qkv = self.qkv(x)
        bias = self.qkv.bias
        assert bias is not None
        if height % window_height > 0 or width % window_width > 0:
            # The projection of a padded token, which is zero, is the bias.
            padded = bias.to(qkv.dtype).repeat(batch, rows * window_height, columns * window_width, 1)
            padded[:, :height, :width] = qkv
            qkv = padded
        qkv = qkv.view(batch, rows, window_height, columns, window_width, 3, self.num_heads, -1)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).contiguous().flatten(5, 6).flatten(1, 3)
        attended = self._attend(qkv[0], qkv[1], qkv[2], window_height, window_width)
        attended = attended.view(batch, rows, columns, self.num_heads, window_height, window_width, -1)
        attended = attended.permute(0, 1, 4, 2, 5, 3, 6).reshape(
            batch, rows * window_height, columns * window_width, channels
        )
        # A product of a slice would be computed row by row.
        return self.proj(attended[:, :height, :width].contiguous())

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Attend within grids of tokens.

        Args:
            q: queries Gxheadsx(`height`*`width`)xD, G grids; keys `k` and values `v` likewise.
            k: keys.
            v: values.
            height: rows of a grid.
            width: columns of a grid.

        Returns:
            Gxheadsx(`height`*`width`)xD.
        """
        bias_h, bias_w = self._relative_positions(q, height, width)
        if q.device.type != "cpu":
            return _attend_in_blocks(q, k, v, bias_h, bias_w, self.block_elements_gpu)
        if q.dtype == torch.bfloat16 and self.has_amx:
            return _attend_with_folded_bias(q, k, v, bias_h, bias_w, self.tile_dims)
        # The blocks run over grids and heads together.
        q, k, v, bias_h, bias_w = [part.flatten(0, 1).unsqueeze(0) for part in (q, k, v, bias_h, bias_w)]
        attended = _attend_in_blocks(q, k, v, bias_h, bias_w, self.block_elements_cpu)
        return attended.view(-1, self.num_heads, height * width, attended.shape[3])

    def _relative_positions(self, q: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bias that relative positions add to the scores, for each row and each column of keys.

        The tables are computed from the current weights in every call, which costs almost nothing.

        Args:
            q: queries Gxheadsx(`height`*`width`)xD.
            height: rows of a grid.
            width: columns of a grid.

        Returns:
            Gxheadsx(`height`*`width`)x`height` and Gxheadsx(`height`*`width`)x`width`.
        """
        table_h = sam_image_encoder.get_rel_pos(height, height, self.rel_pos_h)
        table_w = sam_image_encoder.get_rel_pos(width, width, self.rel_pos_w)
        grid = q.unflatten(2, [height, width])
        bias_h = torch.einsum("gnhwc,hkc->gnhwk", grid, table_h)
        bias_w = torch.einsum("gnhwc,wkc->gnhwk", grid, table_w)
        return bias_h.flatten(2, 3), bias_w.flatten(2, 3)


def rows_at_a_time(x: torch.Tensor, channels: int) -> int:
    """Return how many rows of a grid to compute at a time.

    On a CPU, intermediate results of 16 MB stay in the caches, and glibc reuses their memory. It returns blocks beyond
    32 MB to the system, and clearing new pages takes longer than filling them. A GPU needs large results.

    Args:
        x: tokens BxHxWxC.
        channels: channels of the largest intermediate result.
    """
    elements = 1 << 22 if x.device.type == "cpu" else 1 << 28
    return max(1, elements // (x.shape[2] * channels))


def concatenate(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate tensors along a dimension, without a copy if there is only one."""
    return torch.cat(parts, dim=dim) if len(parts) > 1 else parts[0]


def _attend_in_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias_h: torch.Tensor, bias_w: torch.Tensor, limit: int
) -> torch.Tensor:
    """Attend to the whole grid, a few heads and query rows at a time.

    Args:
        q: queries GxheadsxNxD; keys `k` and values `v` likewise.
        k: keys.
        v: values.
        bias_h: GxheadsxNxH, added to the scores of all keys in a row; N = H*W.
        bias_w: GxheadsxNxW, added to the scores of all keys in a column.
        limit: scores in memory at a time, per grid.

    Returns:
        GxheadsxNxD.
    """
    heads, tokens = q.shape[1], q.shape[2]
    head_step = max(1, min(heads, limit // (tokens * tokens)))
    query_step = max(1, min(tokens, limit // tokens))
    by_head = []
    for head in range(0, heads, head_step):
        keys, values = k[:, head : head + head_step], v[:, head : head + head_step]
        by_query = []
        for query in range(0, tokens, query_step):
            queries = q[:, head : head + head_step, query : query + query_step]
            part_h = bias_h[:, head : head + head_step, query : query + query_step].unsqueeze(4)
            part_w = bias_w[:, head : head + head_step, query : query + query_step].unsqueeze(3)
            if q.device.type == "cpu":
                # Explicit products take oneDNN's kernels; `scaled_dot_product_attention` takes MKL's.
                products = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
                scores = (part_h.float() + part_w).flatten(3).flatten(0, 1).add_(products, alpha=1 / math.sqrt(q.shape[3]))
                weights = torch.softmax(scores, dim=2).to(v.dtype)
                by_query.append(torch.bmm(weights, values.flatten(0, 1)).view(queries.shape))
            else:
                bias = (part_h + part_w).flatten(3)
                by_query.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias))
        by_head.append(concatenate(by_query, dim=2))
    return concatenate(by_head, dim=1)


def _attend_with_folded_bias(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias_h: torch.Tensor, bias_w: torch.Tensor, multiple: int
) -> torch.Tensor:
    """Attend with the bias folded into the queries.

    The queries get the bias as additional dimensions, and the keys a one-hot code of their row and column, so that the
    product of both contains the bias. A bf16 matrix unit computes the longer products faster than a bias is written to
    memory and read again.

    Args:
        q: queries; all shapes as for `_attend_in_blocks`.
        k: keys.
        v: values.
        bias_h: added to the scores of all keys in a row.
        bias_w: added to the scores of all keys in a column.
        multiple: the number of dimensions is padded with zeros to a multiple of it.
    """
    dim, height, width = q.shape[3], bias_h.shape[3], bias_w.shape[3]
    scale = 1 / math.sqrt(dim)
    row_of_key = torch.eye(height, dtype=k.dtype, device=k.device).repeat_interleave(width, 0)
    column_of_key = torch.eye(width, dtype=k.dtype, device=k.device).repeat(height, 1)
    padding = -(dim + height + width) % multiple
    shape = [k.shape[0], k.shape[1], -1, -1]
    long_q = torch.cat([q, bias_h / scale, bias_w / scale], dim=3)
    long_k = torch.cat([k, row_of_key.expand(shape), column_of_key.expand(shape)], dim=3)
    attended = F.scaled_dot_product_attention(
        F.pad(long_q, [0, padding]), F.pad(long_k, [0, padding]), F.pad(v, [0, height + width + padding]), scale=scale
    )
    return attended[..., :dim]
