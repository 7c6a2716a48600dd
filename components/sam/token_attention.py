"""SAM's two-way attention between a few tokens and an image, with all products on the tokens' side.

SAM projects every position of the image to queries, keys and values of 128 channels. But a score q.(W k) is (W^T q).k:
projecting the few tokens instead leaves the image to be multiplied by 40 vectors (5 tokens, 8 heads). The same goes for
what the image takes from the tokens, and for values, whose projection can wait until they have been averaged. The
numbers are the same, forward and backward.

Source: `segment_anything/modeling/transformer.py`, whose parameters and names these are. Shapes are written with G
images, C classes that share an image, T tokens a class and N positions of an image.
"""

import math

import torch

from components.sam.segment_anything_import import import_from_segment_anything

sam_transformer = import_from_segment_anything("modeling.transformer")


class TokenToImageAttention(sam_transformer.Attention):  # type: ignore[name-defined]
    """Attention of tokens to the positions of an image."""

    def forward(self, asking: torch.Tensor, image: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            asking: tokens GxKx256 with their positional encoding.
            image: GxNx256, keys and values.
            positions: Nx256, added to the keys.

        Returns:
            GxKx256.
        """
        heads = self.num_heads
        q = self.q_proj(asking).unflatten(2, [heads, -1])
        scores = _scores(q, self.k_proj.weight, self.k_proj.bias, image, positions)
        seen = torch.softmax(scores, dim=-1) @ image
        values = torch.einsum(
            "ghkc,hdc->gkhd", seen.unflatten(1, [heads, -1]), self.v_proj.weight.unflatten(0, [heads, -1])
        )
        return self.out_proj(values.flatten(2) + self.v_proj.bias)


class ImageToTokenAttention(sam_transformer.Attention):  # type: ignore[name-defined]
    """Attention of an image's positions to the tokens of each class."""

    def forward(
        self, image: torch.Tensor, positions: torch.Tensor, asked: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Attend.

        Args:
            image: GxNx256, queries.
            positions: Nx256, added to the queries.
            asked: keys GxCxTx256, tokens with their positional encoding.
            tokens: values GxCxTx256.

        Returns:
            GxCxNx256, for each class what its tokens tell the image.
        """
        heads, (classes, count) = self.num_heads, tokens.shape[1:3]
        k = self.k_proj(asked.flatten(1, 2)).unflatten(2, [heads, -1])
        scores = _scores(k, self.q_proj.weight, self.q_proj.bias, image, positions)
        weights = torch.softmax(scores.view(-1, heads, classes, count, scores.shape[2]), dim=3)
        v = self.v_proj(tokens).unflatten(3, [heads, -1])
        told = torch.einsum("gcthd,ehd->gchte", v, self.out_proj.weight.unflatten(1, [heads, -1]))
        told = told + self.out_proj.bias / heads  # as each head's weights sum to one
        return weights.transpose(1, 2).flatten(2, 3).transpose(2, 3) @ told.flatten(2, 3)


class TwoWayBlock(sam_transformer.TwoWayAttentionBlock):  # type: ignore[name-defined]
    """Self-attention of tokens, tokens to image, MLP, image to tokens."""

    def forward(
        self, queries: torch.Tensor, tokens: torch.Tensor, image: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update tokens and image.

        Args:
            queries: GxCxTx256, what has become of the tokens so far.
            tokens: GxCxTx256, the tokens themselves, which serve as their positional encoding.
            image: GxNx256, shared by the classes.
            positions: Nx256.

        Returns:
            queries GxCxTx256, and the image (GxC)xNx256, which from here on is another for each class.
        """
        images, classes, count, channels = queries.shape
        flat = queries.flatten(0, 1)
        if self.skip_first_layer_pe:
            flat = self.self_attn(q=flat, k=flat, v=flat)
        else:
            asking = flat + tokens.flatten(0, 1)
            flat = flat + self.self_attn(q=asking, k=asking, v=flat)
        queries = self.norm1(flat).view(images, classes, count, channels)

        # Tokens ask independently of one another: those of all classes can ask the one image together.
        seen = self.cross_attn_token_to_image((queries + tokens).flatten(1, 2), image, positions)
        queries = self.norm2(queries + seen.view(images, classes, count, channels))
        queries = self.norm3(queries + self.mlp(queries))

        told = self.cross_attn_image_to_token(image, positions, queries + tokens, queries)
        return queries, self.norm4(image.unsqueeze(1) + told).flatten(0, 1)


class TwoWayTransformer(sam_transformer.TwoWayTransformer):  # type: ignore[name-defined]
    """Layers of two-way attention, then one last look of the tokens at the image."""

    def __init__(self, depth: int, embedding_dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__(depth, embedding_dim, num_heads, mlp_dim)
        for index in range(depth):
            block = TwoWayBlock(embedding_dim, num_heads, mlp_dim, skip_first_layer_pe=index == 0)
            block.cross_attn_token_to_image = TokenToImageAttention(embedding_dim, num_heads, downsample_rate=2)
            block.cross_attn_image_to_token = ImageToTokenAttention(embedding_dim, num_heads, downsample_rate=2)
            self.layers[index] = block
        self.final_attn_token_to_image = TokenToImageAttention(embedding_dim, num_heads, downsample_rate=2)

    def forward(
        self, tokens: torch.Tensor, image: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let tokens and image attend to each other.

        Args:
            tokens: GxCxTx256.
            image: GxNx256.
            positions: Nx256.

        Returns:
            tokens (GxC)xTx256 and the image as each class sees it, (GxC)xNx256.
        """
        queries = tokens
        for layer in self.layers:
            queries, image = layer(queries, tokens, image, positions)
            # From the first layer on each class has an image of its own.
            queries, tokens = queries.flatten(0, 1).unsqueeze(1), tokens.flatten(0, 1).unsqueeze(1)
        queries, tokens = queries.squeeze(1), tokens.squeeze(1)
        seen = self.final_attn_token_to_image(queries + tokens, image, positions)
        return self.norm_final_attn(queries + seen), image


def _scores(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, image: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Score projected tokens against an image that would have to be projected too.

    Args:
        tokens: GxKxheadsxD, projected.
        weight: (heads*D)x256, the image's projection.
        bias: its bias, heads*D.
        image: GxNx256.
        positions: Nx256, added to the image.

    Returns:
        Gx(heads*K)xN, head by head, scaled.
    """
    heads, dim = tokens.shape[2], tokens.shape[3]
    tokens = tokens / math.sqrt(dim)
    asking = torch.einsum("gkhd,hdc->ghkc", tokens, weight.unflatten(0, [heads, -1])).flatten(1, 2)
    offset = torch.einsum("gkhd,hd->ghk", tokens, bias.unflatten(0, [heads, -1])).flatten(1, 2).unsqueeze(2)
    return torch.baddbmm(asking @ positions.t() + offset, asking, image.transpose(1, 2))
