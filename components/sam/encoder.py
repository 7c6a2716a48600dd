"""SAM's image encoder as a module, frozen or trained in part or in whole, with a fingerprint of its weights."""

import copy
import hashlib
import logging
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from components.base.export import in_export
from components.base.weights import fixed_random_weights
from components.embeddings.cache import BlankImageCache, EmbeddingCache
from components.sam.checkpoint import load_part, read_checkpoint
from components.sam.encoders import encoder_type, encoder_weights
from components.sam.image_encoder import with_cast_weights
from components.sam.low_rank import (
    add_low_rank_updates,
    frozen_weights,
    is_update,
    merge_low_rank_updates,
    updated_weights,
)

logger = logging.getLogger(__name__)


class SamEncoder(nn.Module):
    """SAM's image encoder from pixels to embeddings, frozen unless `trainable`.

    Source: paper section 3.1. Differs: pixels are normalised as SAM does, which the authors' code leaves out.

    Embeddings have `out_channels` channels, and a token for `stride` x `stride` pixels.

    A frozen encoder stays in eval mode and runs under `no_grad`. Its `state_dict()` holds only the fingerprint: 32
    bytes that identify the weights, independently of image size and precision. A trainable encoder's `state_dict()`
    holds the weights as well. A state dict with encoder weights must have all of them and the fingerprint of these. A
    state dict without encoder weights must have the fingerprint of the weights that this encoder has already. With
    `lora`, a `state_dict()` holds the updates and the fingerprint of the frozen weights. Another encoder with these
    weights takes the updates into its weights when it loads them.

    With `cache_dir`, embeddings are read from the cache if this or another run or process has encoded the image before.
    The key is the exact image, the fingerprint of the current weights, `image_size` and precision. New
    embeddings are rounded to `cache_dtype` too, so that the first epoch equals the later ones. Without `cache_dir`,
    only the last blank image is cached. When scripted, traced or exported, the encoder runs without cache, in fp32.

    Args:
        model_type: a key of `components.sam.encoders.ENCODERS`, such as `vit_b`.
        checkpoint: a checkpoint of that type, loaded strictly; None for random weights, the same in every run.
        image_size: side in pixels to which images are resized, a multiple of the type's `size_multiple`.
        trainable: whether the encoder's weights are trained too (the paper's "AutoSAM (ft all)"). `neck` trains the
            last layers alone, the type's `neck`. `lora` trains low-rank updates of its queries and values.
        cache_dir: folder of the embedding cache; None for no cache.
        cache_gb: maximum size of this folder in units of 10^9 bytes; once it is reached, nothing is added.
        cache_dtype: type of cached values, `float16` or `float32` (twice the space, no rounding).

    Raises:
        ValueError: for an unknown model type, an impossible image size, a checkpoint that does not fit, another
            `trainable`. For a cache of an encoder that is trained.
        FileNotFoundError: when the checkpoint is not there.
        ImportError: when the encoder needs `transformers`, which is not installed.
    """

    __jit_ignored_attributes__: ClassVar[list[str]] = [
        "cache",
        "_active_cache",
        "_versions",
        "_copies",
        "_neck",
        "_before_updates",
    ]

    def __init__(
        self,
        model_type: str,
        checkpoint: str | None = None,
        image_size: int = 1024,
        trainable: bool | str = False,
        *,
        cache_dir: str | None = None,
        cache_gb: float = 16.0,
        cache_dtype: str = "float16",
    ) -> None:
        super().__init__()
        entry = encoder_type(model_type)
        multiple = entry.size_multiple
        if image_size < multiple or image_size % multiple:
            raise ValueError(f"image_size must be a positive multiple of {multiple}, received {image_size}")
        if not isinstance(trainable, bool) and trainable not in ("neck", "lora"):
            raise ValueError(
                f"trainable must be True, False, 'neck' or 'lora', received {trainable!r}: "
                "write `--trainable_encoder True`, False, neck or lora"
            )
        if trainable and cache_dir is not None:
            raise ValueError(
                "a trainable encoder's embeddings change with every step, so none can be looked up: "
                "give --cache_dir '$None', or --trainable_encoder False"
            )
        self.model_type = model_type
        self.image_size = image_size
        self.trainable = bool(trainable)  # in part or in whole
        self.out_channels = entry.out_channels
        self.stride = entry.stride
        self.image_encoder = _build(model_type, checkpoint, image_size)
        self.image_encoder.requires_grad_(trainable is True)
        self._neck = entry.neck if trainable == "neck" else ()
        for part in self._neck:
            self.image_encoder.get_submodule(part).requires_grad_(True)
        self._has_updates = trainable == "lora"
        if self._has_updates:
            add_low_rank_updates(self.image_encoder, model_type)
        self._before_updates: dict[str, torch.Tensor] = {}  # weights into which updates of a file have been put
        self.pixel_mean = nn.Buffer(torch.tensor(entry.pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.pixel_std = nn.Buffer(torch.tensor(entry.pixel_std).view(1, 3, 1, 1), persistent=False)
        self.fingerprint = nn.Buffer(torch.zeros(32, dtype=torch.uint8))
        self.cache = None
        if cache_dir is not None:
            self.cache = EmbeddingCache(cache_dir, limit_gb=cache_gb, dtype=cache_dtype)
        self._active_cache = BlankImageCache() if self.cache is None else self.cache
        self._versions: list[tuple[int, int]] = []
        self._copies: dict[torch.dtype, nn.Module] = {}
        _update_fingerprint(self)
        self.register_state_dict_post_hook(_drop_frozen_weights)
        self.register_load_state_dict_pre_hook(_check_and_complete)
        self.train(self.training)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize, normalise and encode images.

        Args:
            images: Bx3xHxW in 0..255, any height and width.

        Returns:
            embeddings BxCxhxw, C being `out_channels`, h and w image_size/`stride`.
        """
        # A single return, because torch.jit.script cannot return from within a `with` block.
        if self.trainable:
            embeddings = self._encode(images)
        else:
            with torch.no_grad():
                if torch.jit.is_scripting():  # noqa: SIM108 - only a statement keeps the other branch out of the script
                    embeddings = self._encode(images)
                else:
                    embeddings = self._encode_with_cache(images)
        return embeddings

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Resize images to `image_size` and normalise them by the encoder's pixel mean and standard deviation.

        Args:
            images: Bx3xHxW in 0..255.

        Returns:
            Bx3x`image_size`x`image_size`, of about zero mean and unit variance.
        """
        height, width = images.shape[2], images.shape[3]
        if height != self.image_size or width != self.image_size:
            # A low-pass filter is needed for downsampling only.
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
        """Encode a whole batch, without cache."""
        return self.image_encoder(self.preprocess(images)).contiguous()

    @torch.jit.unused
    def _encode_with_cache(self, images: torch.Tensor) -> torch.Tensor:
        """Look up the images of a batch in the cache, and encode the others, equal ones once.

        Args:
            images: Bx3xHxW in 0..255.

        Returns:
            embeddings, as `forward`.
        """
        weights_dtype = next(self.image_encoder.parameters()).dtype
        if in_export() or weights_dtype != torch.float32:
            return self._encode(images)
        images = images.as_subclass(torch.Tensor)  # MONAI's tensors copy their metadata in every operation
        namespace = self._namespace(images.device.type)
        encoder = self._encoder_in_use(images.device.type)
        keys = [self._active_cache.key(namespace, image) for image in images]
        by_key = {key: self._active_cache.get(key) for key in dict.fromkeys(keys)}
        misses = [key for key, embedding in by_key.items() if embedding is None]
        # On a CPU, more tokens at a time need more memory and save no time.
        step = max(1, (512 // self.image_size) ** 2) if images.device.type == "cpu" else len(images)
        for start in range(0, len(misses), step):
            part = misses[start : start + step]
            batch = images[[keys.index(key) for key in part]]
            embeddings = encoder(self.preprocess(batch)).contiguous()
            for key, embedding in zip(part, embeddings, strict=True):
                by_key[key] = self._active_cache.put(key, embedding)
        shape = cast(torch.Tensor, by_key[keys[0]]).shape
        embeddings = torch.empty((len(keys), *shape), device=images.device)
        for index, key in enumerate(keys):
            embeddings[index].copy_(cast(torch.Tensor, by_key[key]))  # converts to fp32 and moves to the device
        return embeddings

    def _encoder_in_use(self, device_type: str) -> nn.Module:
        """Return the image encoder or, under autocast on a CPU, its copy whose weights are cast, made once."""
        if device_type != "cpu" or not torch.is_autocast_enabled(device_type):
            return self.image_encoder
        dtype = torch.get_autocast_dtype(device_type)
        if dtype not in self._copies:
            self._copies[dtype] = with_cast_weights(self.image_encoder, dtype)
        return self._copies[dtype]

    def _namespace(self, device_type: str) -> str:
        """Return a string of all that an embedding depends on besides the image."""
        reduced = torch.is_autocast_enabled(device_type)
        precision = torch.get_autocast_dtype(device_type) if reduced else torch.float32
        identity = bytes(_update_fingerprint(self).tolist()).hex()
        return f"{identity} image_size={self.image_size} precision={precision}"

    def train(self, mode: bool = True) -> "SamEncoder":
        """Set the training mode; what is frozen of the image encoder stays in eval mode."""
        super().train(mode)
        if not self.trainable or self._neck or self._has_updates:
            self.image_encoder.eval()
        for part in self._neck:
            self.image_encoder.get_submodule(part).train(mode)
        return self

    def __prepare_scriptable__(self) -> "SamEncoder":
        """Return this encoder for `torch.jit.script`, or a copy whose weights have taken the updates up."""
        if not self._has_updates:
            return self
        merged = copy.deepcopy(self)
        merge_low_rank_updates(merged.image_encoder)
        return merged


def fingerprint(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the fingerprint of an image encoder's weights.

    Args:
        state: its state dict, with SAM's key names and positional embeddings at native size. For SAM 2.1, with
            those of `transformers`.

    Returns:
        uint8 tensor of 32 elements, the SHA-256 of keys, shapes and fp32 values.
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _build(model_type: str, checkpoint: str | None, image_size: int) -> nn.Module:
    """Build an image encoder with the weights of a checkpoint or, with a warning, random ones of a fixed seed."""
    entry = encoder_type(model_type)
    with fixed_random_weights():
        encoder = entry.build(image_size)
    if checkpoint is None:
        logger.warning(
            "*** The %s image encoder has RANDOM weights, as no checkpoint was given.     ***\n"
            "*** It has learned nothing: for real work give --sam_checkpoint a file.      ***",
            model_type,
        )
        return encoder
    state = read_checkpoint(checkpoint, page=entry.page)
    weights = encoder_weights(state, model_type, encoder.state_dict(), path=checkpoint)
    load_part(encoder, "image_encoder", weights, path=checkpoint)
    return encoder


def _update_fingerprint(encoder: SamEncoder) -> torch.Tensor:
    """Update and return an encoder's fingerprint; the weights are hashed only if they may have changed."""
    named = (*encoder.image_encoder.named_parameters(), *encoder.image_encoder.named_buffers())
    weights = [weight for name, weight in named if not is_update(name)]
    # An in-place change increments a tensor's version, except by a fused optimizer. Weights that were cast to a lower
    # precision keep their fingerprint, which cannot be computed from them any more.
    versions = [(weight.data_ptr(), weight._version) for weight in weights]
    in_fp32 = all(weight.dtype == torch.float32 for weight in weights if weight.is_floating_point())
    changes = encoder.trainable and not encoder._has_updates
    if in_fp32 and (changes or versions != encoder._versions):
        with torch.no_grad():
            encoder.fingerprint.copy_(fingerprint(frozen_weights(encoder.image_encoder.state_dict())))
        encoder._versions = versions
        encoder._copies.clear()
    return encoder.fingerprint


def _encoder_weights(state: Mapping[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    """Return the image encoder's weights from a larger state dict, by key without prefix."""
    start = f"{prefix}image_encoder."
    return {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}


def _drop_frozen_weights(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Update the fingerprint in a state dict, and remove a frozen encoder's weights from it."""
    assert isinstance(module, SamEncoder)
    _update_fingerprint(module)  # in place, so in the state dict as well
    if not module.trainable or module._has_updates:
        for key in _encoder_weights(state, prefix):
            if not is_update(key):
                del state[f"{prefix}image_encoder.{key}"]


def _check_and_complete(
    module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, _strict: bool, *_reports: list[str]
) -> None:
    """Reject a state dict of another encoder before anything is loaded, and add the encoder's weights if it lacks them.

    Raises:
        RuntimeError: when the weights are incomplete or the fingerprint does not match them.
    """
    assert isinstance(module, SamEncoder)
    held = _encoder_weights(state, prefix)
    updates = {key: value for key, value in held.items() if is_update(key)}
    received = {key: value for key, value in held.items() if key not in updates}
    if received:
        _check_own_encoder(module, received, prefix)
        expected, owner = fingerprint(received), "the encoder weights beside it: the checkpoint is damaged"
    else:
        expected = _fingerprint_in_use(module)
        owner = (
            f"the {module.model_type} encoder in use: give the --model_type and --sam_checkpoint "
            "that the head was trained with"
        )
    stored = state.setdefault(f"{prefix}fingerprint", expected) if received else state.get(f"{prefix}fingerprint")
    if stored is not None and not torch.equal(stored.cpu(), expected.cpu()):
        raise RuntimeError(
            f"the checkpoint's encoder fingerprint {_short_hex(stored)} is not {_short_hex(expected)}, that of {owner}"
        )
    if received:
        module._before_updates = {}
        return
    if not module._has_updates:  # they become part of the weights
        for key in updates:
            del state[f"{prefix}image_encoder.{key}"]
    for key, value in _weights_in_use(module, updates).items():
        state.setdefault(f"{prefix}image_encoder.{key}", value)


def _check_own_encoder(module: SamEncoder, received: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Check the weights of an encoder that a state dict brings along.

    Raises:
        RuntimeError: when low-rank updates cannot start from them, or some are missing.
    """
    if module._has_updates:
        raise RuntimeError(
            "the checkpoint holds an encoder of its own, which trainable_encoder lora cannot start from: "
            "give --trainable_encoder neck or True, or another start"
        )
    if missing := [f"{prefix}image_encoder.{key}" for key in module.image_encoder.state_dict() if key not in received]:
        raise RuntimeError(f"the checkpoint holds the image encoder only in part; missing: {', '.join(missing)}")


def _fingerprint_in_use(module: SamEncoder) -> torch.Tensor:
    """Return the fingerprint of the encoder's weights as they were before updates became part of them."""
    if module._before_updates:
        return fingerprint(frozen_weights(dict(module.image_encoder.state_dict())) | module._before_updates)
    return _update_fingerprint(module).clone()  # since loading writes into the buffer


def _weights_in_use(module: SamEncoder, updates: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights that go with a state dict without an encoder: the frozen ones, and its updates added to them.

    An encoder that trains updates keeps them apart. It has those of the state dict, or else its own.
    """
    own = dict(module.image_encoder.state_dict())
    frozen = frozen_weights(own) | module._before_updates
    if module._has_updates:
        return {key: value for key, value in own.items() if not (updates and is_update(key))}
    merged = updated_weights(module.image_encoder, frozen, updates) if updates else {}
    module._before_updates = {key: frozen[key].clone() for key in merged}  # loading overwrites these
    return frozen | merged


def _short_hex(value: torch.Tensor) -> str:
    """Return the first eight bytes of a fingerprint in hexadecimal."""
    return bytes(value.cpu().tolist()[:8]).hex()
