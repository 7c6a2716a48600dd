"""SAM's attention with decomposed relative positions, with less memory and without work on padding."""

import math
from typing import Final

import torch
import torch.nn.functional as F

from components.base.export import in_export
from components.base.precision import has_amx
from components.sam.segment_anything_import import import_from_segment_anything

sam_image_encoder = import_from_segment_anything("modeling.image_encoder")


class RelPosAttention(sam_image_encoder.Attention):  # type: ignore[name-defined]
    """Multi-head self-attention with decomposed relative positions.

    Source: `Attention` of `segment_anything/modeling/image_encoder.py`, with the same parameters and results. Differs:
    results are computed block by block, so that memory never holds the scores or the bias of all heads. In windows,
    padded tokens are not projected: their queries, keys and values are the bias of the projection.
    """

    # Scores in memory at a time: on a CPU about as many as its L2 cache holds, on a GPU enough to occupy it. A graph
    # that is exported has fewer blocks.
    block_elements_cpu: Final[int] = 2**18
    block_elements_export: Final[int] = 2**20
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
        rows = []
        for row in _split_remainder(self.qkv(x), window_height, 1):
            parts = _split_remainder(row, window_width, 2)
            rows.append(concatenate([self._attend_in_part(part, window_height, window_width) for part in parts], dim=2))
        return self.proj(concatenate(rows, dim=1).contiguous())  # a product of a slice is computed row by row

    def _attend_in_part(self, qkv: torch.Tensor, window_height: int, window_width: int) -> torch.Tensor:
        """Attend within windows.

        Args:
            qkv: projected tokens BxHxWx3C.
            window_height: rows of a window; beyond H, windows contain padded tokens.
            window_width: columns of a window, likewise.

        Returns:
            BxHxWxC, before the last projection.
        """
        batch, height, width = qkv.shape[:3]
        rows, columns = -(-height // window_height), -(-width // window_width)
        bias = self.qkv.bias
        assert bias is not None
        if height % window_height > 0 or width % window_width > 0:
            # The projection of a padded token, which is zero, is the bias.
            padded = bias.to(qkv.dtype).repeat(batch, rows * window_height, columns * window_width, 1)
            padded[:, :height, :width] = qkv
            qkv = padded
        qkv = qkv.view(batch, rows, window_height, columns, window_width, 3, self.num_heads, -1)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).contiguous().flatten(1, 3)
        # Where a part has but one row or column of windows, its padded tokens ask nothing.
        query_height, query_width = min(height, window_height), min(width, window_width)
        q, k, v = qkv[0, :, :, :query_height, :query_width], qkv[1], qkv[2]
        attended = self._attend(q, k, v).view(batch, rows, columns, self.num_heads, query_height, query_width, -1)
        attended = attended.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return attended[:, :height, :width]

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend within grids of tokens.

        Args:
            q: queries GxheadsxhxwxD, G grids: those of the first h rows and w columns.
            k: keys GxheadsxHxWxD.
            v: values GxheadsxHxWxD.

        Returns:
            Gxheadsx(h*w)xD.
        """
        bias_h, bias_w = self._relative_positions(q, k.shape[2], k.shape[3])
        q, k, v = q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)
        on_cpu = q.device.type == "cpu"
        if on_cpu and q.dtype == torch.bfloat16 and self.has_amx:
            return _attend_with_folded_bias(q, k, v, bias_h, bias_w, self.tile_dims)
        if not on_cpu or in_export():
            limit = self.block_elements_export if on_cpu else self.block_elements_gpu
            return _attend_in_blocks(q, k, v, bias_h, bias_w, limit)
        q, k, v, bias_h, bias_w = [part.flatten(0, 1) for part in (q, k, v, bias_h, bias_w)]
        attended = _attend_by_products(q, k, v, bias_h, bias_w, self.block_elements_cpu)
        return attended.unflatten(0, [-1, self.num_heads])

    def _relative_positions(self, q: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bias that relative positions add to the scores, for each row and each column of keys.

        The tables are computed from the current weights in every call, which costs almost nothing.

        Args:
            q: queries GxheadsxhxwxD.
            height: rows H of keys.
            width: columns W of keys.

        Returns:
            Gxheadsx(h*w)xH and Gxheadsx(h*w)xW.
        """
        table_h = sam_image_encoder.get_rel_pos(height, height, self.rel_pos_h)[: q.shape[2]]
        table_w = sam_image_encoder.get_rel_pos(width, width, self.rel_pos_w)[: q.shape[3]]
        bias_h = torch.einsum("gnhwc,hkc->gnhwk", q, table_h)
        bias_w = torch.einsum("gnhwc,wkc->gnhwk", q, table_w)
        return bias_h.flatten(2, 3), bias_w.flatten(2, 3)


def _split_remainder(x: torch.Tensor, size: int, dim: int) -> list[torch.Tensor]:
    """Split off what a dimension has beyond a multiple of `size`.

    This is done on a CPU only, since a GPU computes one large part faster than several smaller ones.
    """
    whole = x.shape[dim] // size * size
    if x.device.type != "cpu" or whole == 0 or whole == x.shape[dim]:
        return [x]
    return list(x.split([whole, x.shape[dim] - whole], dim=dim))


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
        q: queries GxheadsxNxD.
        k: keys Gxheadsx(H*W)xD.
        v: values Gxheadsx(H*W)xD.
        bias_h: GxheadsxNxH, added to the scores of all keys in a row.
        bias_w: GxheadsxNxW, added to the scores of all keys in a column.
        limit: scores in memory at a time, per grid.

    Returns:
        GxheadsxNxD.
    """
    heads, tokens = q.shape[1], q.shape[2]
    head_step = max(1, min(heads, limit // (tokens * k.shape[2])))
    query_step = max(1, min(tokens, limit // k.shape[2]))
    by_head = []
    for head in range(0, heads, head_step):
        by_query = []
        for query in range(0, tokens, query_step):
            part_h = bias_h[:, head : head + head_step, query : query + query_step]
            part_w = bias_w[:, head : head + head_step, query : query + query_step]
            by_query.append(
                F.scaled_dot_product_attention(
                    q[:, head : head + head_step, query : query + query_step],
                    k[:, head : head + head_step],
                    v[:, head : head + head_step],
                    attn_mask=(part_h.unsqueeze(4) + part_w.unsqueeze(3)).flatten(3),
                )
            )
        by_head.append(concatenate(by_query, dim=2))
    return concatenate(by_head, dim=1)


def _attend_by_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias_h: torch.Tensor, bias_w: torch.Tensor, limit: int
) -> torch.Tensor:
    """Attend as `_attend_in_blocks`, by explicit products, which take a CPU's fastest kernels, with scores in fp32.

    Args:
        q: queries PxNxD, of P heads of all grids; all other shapes likewise.
        k: keys.
        v: values.
        bias_h: added to the scores of all keys in a row.
        bias_w: added to the scores of all keys in a column.
        limit: scores in memory at a time.
    """
    heads, tokens, dim = q.shape
    head_step = max(1, min(heads, limit // (tokens * k.shape[1])))
    query_step = max(1, min(tokens, limit // k.shape[1]))
    attended = torch.empty_like(q)  # small results kept between the blocks would split the memory that these reuse
    for head in range(0, heads, head_step):
        keys, values = k[head : head + head_step].transpose(1, 2), v[head : head + head_step]
        for query in range(0, tokens, query_step):
            part_h = bias_h[head : head + head_step, query : query + query_step].float()
            part_w = bias_w[head : head + head_step, query : query + query_step]
            scores = (part_h.unsqueeze(3) + part_w.unsqueeze(2)).flatten(2)
            products = torch.bmm(q[head : head + head_step, query : query + query_step], keys)
            weights = torch.softmax(scores.add_(products, alpha=1 / math.sqrt(dim)), dim=2).to(v.dtype)
            attended[head : head + head_step, query : query + query_step] = torch.bmm(weights, values)
    return attended


def _attend_with_folded_bias(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias_h: torch.Tensor, bias_w: torch.Tensor, multiple: int
) -> torch.Tensor:
    """Attend with the bias folded into the queries.

    The queries get the bias as additional dimensions, and the keys a one-hot code of their row and column. The product
    of both then contains the bias. A CPU with AMX computes these longer products faster than it writes and reads a
    bias: attention takes about half the time at 1024 pixels.

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
