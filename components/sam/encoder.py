"""SAM's image encoder as a frozen (or trainable) module that knows its own identity."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from components.base.weights import fixed_random_weights
from components.embeddings.cache import BlankImages, EmbeddingCache
from components.sam.checkpoint import load_part, read_sam_checkpoint
from components.sam.image_encoder import ARCHITECTURES, PATCH_SIZE, ImageEncoder

logger = logging.getLogger(__name__)

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class SamEncoder(nn.Module):
    """SAM's image encoder from pixels to embeddings, frozen unless told otherwise.

    Source: paper section 3.1. Differs: pixels are normalised as SAM does, which the authors' code leaves out.

    A frozen encoder stays in eval mode and runs under `no_grad`. Its `state_dict()` holds its fingerprint alone: 32
    bytes that tell its weights from any other's at every image size and precision. Loading goes by content: a state
    dict with encoder weights must hold all of them and describe them truly, and is loaded; one without must carry the
    fingerprint of the weights already here. A trainable encoder's `state_dict()` holds its weights as well.

    With `cache_dir`, an image seen before is looked up instead of encoded, also by other runs and processes: by its
    exact content, under the fingerprint of the weights as they are now, `image_size` and precision. A new image's
    embedding is rounded to the cache's storage type as well, so that no epoch differs from the next. Without it,
    blank images alone are remembered. Scripted, traced and exported, the encoder encodes everything, in fp32.

    Args:
        model_type: `vit_b`, `vit_l`, `vit_h` or `vit_tiny`.
        checkpoint: a SAM checkpoint of that type, loaded strictly; None for random weights, always the same ones.
        image_size: side in pixels to which images are resized, a multiple of 16.
        trainable: whether the encoder's weights train too (the paper's "AutoSAM (ft all)").
        cache_dir: folder in which embeddings are kept; None for no cache.
        cache_gb: most that this folder may hold, in units of 10^9 bytes; beyond it nothing more is kept.
        cache_dtype: type in which they are kept, `float16` or `float32` (twice the space, nothing rounded).

    Raises:
        ValueError: for an unknown model type, an impossible image size, a checkpoint that does not fit, a `trainable`
            that is no bool (a command line's `false` arrives as a word, which would count as true), or a cache for a
            trainable encoder.
        FileNotFoundError: when the checkpoint is not there.
    """

    __jit_ignored_attributes__: ClassVar[list[str]] = ["_hashed", "cache", "_known"]

    def __init__(
        self,
        model_type: str,
        checkpoint: str | None = None,
        image_size: int = 1024,
        trainable: bool = False,
        *,
        cache_dir: str | None = None,
        cache_gb: float = 16.0,
        cache_dtype: str = "float16",
    ) -> None:
        super().__init__()
        if model_type not in ARCHITECTURES:
            raise ValueError(f"unknown model_type {model_type!r}: expected one of {', '.join(ARCHITECTURES)}")
        if image_size < PATCH_SIZE or image_size % PATCH_SIZE:
            raise ValueError(f"image_size must be a positive multiple of {PATCH_SIZE}, received {image_size}")
        if not isinstance(trainable, bool):
            raise ValueError(
                f"trainable must be True or False, received {trainable!r}: write `--trainable_encoder True` or False"
            )
        if trainable and cache_dir is not None:
            raise ValueError(
                "a trainable encoder's embeddings change with every step, so none can be looked up: "
                "give --cache_dir '$None', or --trainable_encoder False"
            )
        self.model_type = model_type
        self.image_size = image_size
        self.trainable = trainable
        self.image_encoder = _build(model_type, checkpoint)
        self.image_encoder.requires_grad_(trainable)
        self.pixel_mean = nn.Buffer(torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.pixel_std = nn.Buffer(torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)
        self.fingerprint = nn.Buffer(torch.zeros(32, dtype=torch.uint8))
        self.cache = None
        if cache_dir is not None:
            self.cache = EmbeddingCache(cache_dir, limit_gb=cache_gb, dtype=cache_dtype)
        self._known = BlankImages() if self.cache is None else self.cache
        self._hashed: list[tuple[int, int]] = []
        _refresh_fingerprint(self)
        self.register_state_dict_post_hook(_reduce_to_what_was_trained)
        self.register_load_state_dict_pre_hook(_check_identity)
        self.train(self.training)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize, normalise and encode images.

        Args:
            images: Bx3xHxW in 0..255, any height and width.

        Returns:
            embeddings Bx256x(image_size/16)x(image_size/16).
        """
        # A single return: torch.jit.script cannot leave a `with` block early.
        if self.trainable:
            embeddings = self._encode(images)
        else:
            with torch.no_grad():
                if torch.jit.is_scripting():  # noqa: SIM108 - a branch that only a statement leaves out of the script
                    embeddings = self._encode(images)
                else:
                    embeddings = self._encode_once(images)
        return embeddings

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Resize images to `image_size` and normalise them by SAM's pixel mean and standard deviation.

        Args:
            images: Bx3xHxW in 0..255.

        Returns:
            Bx3x`image_size`x`image_size`, about zero mean and unit variance.
        """
        height, width = images.shape[2], images.shape[3]
        if height != self.image_size or width != self.image_size:
            # Low-pass filtering matters only where pixels are thrown away.
            shrinks = height > self.image_size or width > self.image_size
            images = F.interpolate(
                images,
                size=[self.image_size, self.image_size],
                mode="bilinear",
                align_corners=False,
                antialias=shrinks,
            )
        return (images - self.pixel_mean) / self.pixel_std

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode a batch in one piece."""
        return self.image_encoder(self.preprocess(images)).contiguous()

    @torch.jit.unused
    def _encode_once(self, images: torch.Tensor) -> torch.Tensor:
        """Encode those images of a batch that are not known yet, and each of them once.

        Args:
            images: Bx3xHxW in 0..255.

        Returns:
            embeddings Bx256x(image_size/16)x(image_size/16).
        """
        weights_dtype = self.image_encoder.neck[0].weight.dtype
        if torch.jit.is_tracing() or torch.compiler.is_compiling() or weights_dtype != torch.float32:
            return self._encode(images)
        images = images.as_subclass(torch.Tensor)  # MONAI's tensors carry metadata through every operation
        namespace = self._namespace(images.device.type)
        keys = [self._known.key(namespace, image) for image in images]
        known = {key: self._known.get(key) for key in dict.fromkeys(keys)}
        new = [key for key, embedding in known.items() if embedding is None]
        # On a CPU more tokens at a time only cost memory.
        step = max(1, (512 // self.image_size) ** 2) if images.device.type == "cpu" else len(images)
        for start in range(0, len(new), step):
            part = new[start : start + step]
            embeddings = self._encode(images[[keys.index(key) for key in part]])
            for key, embedding in zip(part, embeddings, strict=True):
                known[key] = self._known.put(key, embedding)
        shape = cast(torch.Tensor, known[keys[0]]).shape
        embeddings = torch.empty((len(keys), *shape), device=images.device)
        for index, key in enumerate(keys):
            embeddings[index].copy_(cast(torch.Tensor, known[key]))  # to fp32 and to the device in one go
        return embeddings

    def _namespace(self, device_type: str) -> str:
        """Name all that an embedding depends on besides the image."""
        reduced = torch.is_autocast_enabled(device_type)
        precision = torch.get_autocast_dtype(device_type) if reduced else torch.float32
        identity = bytes(_refresh_fingerprint(self).tolist()).hex()
        return f"{identity} image_size={self.image_size} precision={precision}"

    def train(self, mode: bool = True) -> "SamEncoder":
        """Set training mode, which a frozen encoder ignores."""
        super().train(mode)
        if not self.trainable:
            self.image_encoder.eval()
        return self


def fingerprint(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Hash an image encoder's weights.

    Args:
        state: its state dict, with SAM's key names and native positional embeddings.

    Returns:
        uint8 tensor of 32 elements, the SHA-256 of names, shapes and fp32 values.
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _build(model_type: str, checkpoint: str | None) -> ImageEncoder:
    """Build an image encoder and fill it from a checkpoint, or from a constant seed and with a warning."""
    with fixed_random_weights():
        encoder = ImageEncoder(ARCHITECTURES[model_type])
    if checkpoint is None:
        logger.warning(
            "*** The %s image encoder has RANDOM weights, as no SAM checkpoint was given. ***\n"
            "*** It has learned nothing: for real work give --sam_checkpoint a file.      ***",
            model_type,
        )
        return encoder
    state = read_sam_checkpoint(checkpoint)["image_encoder"]
    _check_model_type(state, model_type, checkpoint)
    load_part(encoder, "image_encoder", state, path=checkpoint)
    return encoder


def _check_model_type(state: Mapping[str, torch.Tensor], model_type: str, path: str) -> None:
    """Raise ValueError when the weights are plainly those of another model type."""
    positions = state.get("pos_embed")
    if positions is None or positions.ndim != 4:
        return
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    for other, architecture in ARCHITECTURES.items():
        same = (architecture.embed_dim, architecture.depth) == (positions.shape[3], depth)
        if same and other != model_type:
            raise ValueError(
                f"{path} is a {other} checkpoint, but model_type is {model_type}: "
                f"give --model_type {other}, or --sam_checkpoint a {model_type} file"
            )


def _refresh_fingerprint(encoder: SamEncoder) -> torch.Tensor:
    """Bring an encoder's fingerprint up to date with its weights, hashing them only if they may have changed."""
    weights = list(encoder.image_encoder.parameters())
    # A change in place raises a tensor's version, except those of fused optimizers. Weights cast to less than fp32
    # cannot be hashed as they were.
    hashed = [(weight.data_ptr(), weight._version) for weight in weights]
    if (encoder.trainable or hashed != encoder._hashed) and all(weight.dtype == torch.float32 for weight in weights):
        with torch.no_grad():
            encoder.fingerprint.copy_(fingerprint(encoder.image_encoder.state_dict()))
        encoder._hashed = hashed
    return encoder.fingerprint


def _weights(state: Mapping[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    """Return the image encoder's entries of a larger state dict, without their prefix."""
    start = f"{prefix}image_encoder."
    return {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}


def _reduce_to_what_was_trained(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Bring the fingerprint in a state dict up to date, and leave a frozen encoder's weights out."""
    assert isinstance(module, SamEncoder)
    _refresh_fingerprint(module)  # in place, so in the state dict as well
    if not module.trainable:
        for key in _weights(state, prefix):
            del state[f"{prefix}image_encoder.{key}"]


def _check_identity(
    module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, _strict: bool, *_reports: list[str]
) -> None:
    """Refuse a state dict of another encoder before anything is loaded, and fill in frozen weights left out.

    Raises:
        RuntimeError: when the weights are incomplete or are not those that the fingerprint describes.
    """
    assert isinstance(module, SamEncoder)
    stored = state.get(f"{prefix}fingerprint")
    received = _weights(state, prefix)
    present = dict(module.image_encoder.state_dict())
    if received:
        missing = [f"{prefix}image_encoder.{key}" for key in present if key not in received]
        if missing:
            raise RuntimeError(f"the checkpoint holds the image encoder only in part; missing: {', '.join(missing)}")
        described, what = fingerprint(received), "the encoder weights beside it: the checkpoint is damaged"
        state.setdefault(f"{prefix}fingerprint", described)
    else:
        described = _refresh_fingerprint(module).clone()  # loading is about to write into the buffer
        what = (
            f"the {module.model_type} encoder in use: give the --model_type and --sam_checkpoint "
            "that the head was trained with"
        )
        for key, value in present.items():
            state[f"{prefix}image_encoder.{key}"] = value
    if stored is not None and not torch.equal(stored.cpu(), described.cpu()):
        raise RuntimeError(
            f"the checkpoint's encoder fingerprint {_short(stored)} is not {_short(described)}, that of {what}"
        )


def _short(value: torch.Tensor) -> str:
    """Return the first eight bytes of a fingerprint in hexadecimal."""
    return bytes(value.cpu().tolist()[:8]).hex()
