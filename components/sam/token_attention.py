"""SAM's two-way attention between a few tokens and an image, with all projections on the tokens' side.

SAM projects every position of the image to queries, keys and values of 128 channels. But a score q.(W k) equals
(W^T q).k. Projecting the few tokens instead leaves only 40 vectors to multiply by (5 tokens, 8 heads). The same holds
for the attention from image to tokens, and for values, which can be averaged before their projection. The numbers are
the same, forward and backward.

Source: `segment_anything/modeling/transformer.py`, with the same parameters and names. Shapes: G images, C classes that
share an image, T tokens per class, N positions of an image.
"""

import math

import torch

from components.sam.segment_anything_import import import_from_segment_anything

sam_transformer = import_from_segment_anything("modeling.transformer")


class TokenToImageAttention(sam_transformer.Attention):  # type: ignore[name-defined]
    """Attention of tokens to the positions of an image."""

    def forward(self, tokens: torch.Tensor, image: torch.Tensor, image_pe: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            tokens: queries GxKx256, positional encoding included.
            image: keys and values GxNx256.
            image_pe: Nx256, positional encoding added to the keys.

        Returns:
            GxKx256.
        """
        heads = self.num_heads
        q = self.q_proj(tokens).unflatten(2, [heads, -1])
        scores = _scores(q, self.k_proj.weight, self.k_proj.bias, image, image_pe)
        attended = torch.softmax(scores, dim=-1) @ image
        values = torch.einsum(
            "ghkc,hdc->gkhd", attended.unflatten(1, [heads, -1]), self.v_proj.weight.unflatten(0, [heads, -1])
        )
        return self.out_proj(values.flatten(2) + self.v_proj.bias)


class ImageToTokenAttention(sam_transformer.Attention):  # type: ignore[name-defined]
    """Attention of an image's positions to the tokens of each class."""

    def forward(
        self, image: torch.Tensor, image_pe: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Attend.

        Args:
            image: queries GxNx256.
            image_pe: Nx256, positional encoding added to the queries.
            keys: tokens GxCxTx256, positional encoding included.
            values: tokens GxCxTx256.

        Returns:
            GxCxNx256, the image's update by each class.
        """
        heads, (classes, count) = self.num_heads, values.shape[1:3]
        k = self.k_proj(keys.flatten(1, 2)).unflatten(2, [heads, -1])
        scores = _scores(k, self.q_proj.weight, self.q_proj.bias, image, image_pe)
        weights = torch.softmax(scores.view(-1, heads, classes, count, scores.shape[2]), dim=3)
        v = self.v_proj(values).unflatten(3, [heads, -1])
        projected = torch.einsum("gcthd,ehd->gchte", v, self.out_proj.weight.unflatten(1, [heads, -1]))
        projected = projected + self.out_proj.bias / heads  # as each head's weights sum to one
        return weights.transpose(1, 2).flatten(2, 3).transpose(2, 3) @ projected.flatten(2, 3)


class TwoWayBlock(sam_transformer.TwoWayAttentionBlock):  # type: ignore[name-defined]
    """Self-attention of tokens, attention of tokens to image, MLP, attention of image to tokens."""

    def forward(
        self, queries: torch.Tensor, query_pe: torch.Tensor, image: torch.Tensor, image_pe: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update tokens and image.

        Args:
            queries: GxCxTx256, the tokens as updated so far.
            query_pe: GxCxTx256, the tokens' positional encoding.
            image: GxNx256, shared by the classes.
            image_pe: Nx256, the image's positional encoding.

        Returns:
            queries GxCxTx256, and an image for each class, (GxC)xNx256.
        """
        images, classes, count, channels = queries.shape
        flat = queries.flatten(0, 1)
        if self.skip_first_layer_pe:
            flat = self.self_attn(q=flat, k=flat, v=flat)
        else:
            q = flat + query_pe.flatten(0, 1)
            flat = flat + self.self_attn(q=q, k=q, v=flat)
        queries = self.norm1(flat).view(images, classes, count, channels)

        # Queries do not depend on one another, so those of all classes attend to the image together.
        attended = self.cross_attn_token_to_image((queries + query_pe).flatten(1, 2), image, image_pe)
        queries = self.norm2(queries + attended.view(images, classes, count, channels))
        queries = self.norm3(queries + self.mlp(queries))

        update = self.cross_attn_image_to_token(image, image_pe, queries + query_pe, queries)
        return queries, self.norm4(image.unsqueeze(1) + update).flatten(0, 1)


class TwoWayTransformer(sam_transformer.TwoWayTransformer):  # type: ignore[name-defined]
    """Layers of two-way attention, then a final attention of the tokens to the image."""

    def __init__(self, depth: int, embedding_dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__(depth, embedding_dim, num_heads, mlp_dim)
        for index in range(depth):
            block = TwoWayBlock(embedding_dim, num_heads, mlp_dim, skip_first_layer_pe=index == 0)
            block.cross_attn_token_to_image = TokenToImageAttention(embedding_dim, num_heads, downsample_rate=2)
            block.cross_attn_image_to_token = ImageToTokenAttention(embedding_dim, num_heads, downsample_rate=2)
            self.layers[index] = block
        self.final_attn_token_to_image = TokenToImageAttention(embedding_dim, num_heads, downsample_rate=2)

    def forward(
        self, tokens: torch.Tensor, image: torch.Tensor, image_pe: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the attention between tokens and image in both directions.

        Args:
            tokens: GxCxTx256, which are also their own positional encoding.
            image: GxNx256.
            image_pe: Nx256, the image's positional encoding.

        Returns:
            tokens (GxC)xTx256, and an image for each class, (GxC)xNx256.
        """
        queries = tokens
        for layer in self.layers:
            queries, image = layer(queries, tokens, image, image_pe)
            # From the first layer on, each class has its own image: G*C images of one class each.
            queries, tokens = queries.flatten(0, 1).unsqueeze(1), tokens.flatten(0, 1).unsqueeze(1)
        queries, tokens = queries.squeeze(1), tokens.squeeze(1)
        attended = self.final_attn_token_to_image(queries + tokens, image, image_pe)
        return self.norm_final_attn(queries + attended), image


def _scores(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, image: torch.Tensor, image_pe: torch.Tensor
) -> torch.Tensor:
    """Return the attention scores between projected tokens and an image whose projection is applied to the tokens.

    Args:
        tokens: GxKxheadsxD, projected.
        weight: (heads*D)x256, weight of the image's projection.
        bias: heads*D, bias of the image's projection.
        image: GxNx256.
        image_pe: Nx256, added to the image.

    Returns:
        scaled scores Gx(heads*K)xN, ordered by head.
    """
    heads, dim = tokens.shape[2], tokens.shape[3]
    tokens = tokens / math.sqrt(dim)
    vectors = torch.einsum("gkhd,hdc->ghkc", tokens, weight.unflatten(0, [heads, -1])).flatten(1, 2)
    offset = torch.einsum("gkhd,hd->ghk", tokens, bias.unflatten(0, [heads, -1])).flatten(1, 2).unsqueeze(2)
    return torch.baddbmm(vectors @ image_pe.t() + offset, vectors, image.transpose(1, 2))
