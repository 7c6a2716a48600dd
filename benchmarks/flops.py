"""The minimum number of operations of SAM's image encoder."""

from components.sam.image_encoder import EMBEDDING_CHANNELS, PATCH_SIZE, WINDOW_SIZE, Architecture

MLP_RATIO = 4


def encoder_flops(architecture: Architecture, image_size: int) -> int:
    """Count the useful floating-point operations of encoding one image; a multiply-add counts as two.

    With N = (`image_size` / 16)^2 tokens of D channels:

    - patch embedding: 2 N (3 * 16 * 16) D;
    - linear layers of a block (qkv 3 D^2, projection D^2, MLP 8 D^2): 24 N D^2;
    - attention of a block: 4 D for each pair of query and key in a window (scores and weighted sum);
    - relative positions of a block: 2 D for each query and each row and column of its window;
    - neck: 2 N (256 D + 9 * 256^2).

    The window of a global block is the whole grid. Padding tokens, norms, activations, softmax and biases are excluded.

    Args:
        architecture: the encoder's architecture.
        image_size: side in pixels, a multiple of 16.

    Returns:
        operations per image.
    """
    side, dim = image_size // PATCH_SIZE, architecture.embed_dim
    tokens = side**2
    total = 2 * tokens * (3 * PATCH_SIZE**2) * dim
    for index in range(architecture.depth):
        window = side if index in architecture.global_attn_indexes else WINDOW_SIZE
        total += (8 + 4 * MLP_RATIO) * tokens * dim**2 + _attention_flops(side, window, dim)
    return total + 2 * tokens * (EMBEDDING_CHANNELS * dim + 9 * EMBEDDING_CHANNELS**2)


def _attention_flops(side: int, window: int, dim: int) -> int:
    """Count scores, weighted sums and relative positions on a grid of side `side` in windows of side `window`."""
    lengths = [min(window, side - start) for start in range(0, side, window)]
    windows = [(rows, columns) for rows in lengths for columns in lengths]
    return sum(4 * dim * (h * w) ** 2 + 2 * dim * h * w * (h + w) for h, w in windows)
