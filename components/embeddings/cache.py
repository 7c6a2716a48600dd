"""A cache of a frozen encoder's embeddings, in memory and on disk, keyed by the image and the encoder.

The key is a SHA-256, which costs half of BLAKE2b on CPUs with instructions for it. Only one process writes at a time,
under a file lock that the operating system releases when its holder dies. So the first process to store an embedding
wins, and a killed process leaves at most one partial file, which the next write replaces. Writes are not synced to the
disk, since an entry damaged by a power cut fails its checksum. Nothing is evicted, since least-recently-used eviction
would yield no hit at all in epochs larger than the limit.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import nn

from components.embeddings.entry_files import entry_path, entry_sizes, locked, pack, size_in_bytes, unpack

logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "float32": torch.float32}
GB = 1e9

_FORMAT = 1  # part of every key, so files of another format are never hit
_RECOUNTS = 64  # after adding this fraction of the limit, a process measures the folder again


class EmbeddingCache:
    """A cache of embeddings; every hit for an image and an encoder has the same bits, those stored first.

    Several processes may share a folder, and may be killed at any time. A damaged file counts as a miss and is
    replaced. Nothing is created, opened or read before the first look-up. Copies and pickles hold the settings only.

    Once the limit is reached, nothing more is stored. A process notices late what others add, so each may exceed the
    limit by a 64th of it. Once the folder has been opened, a failure to write, such as a full disk, does not end the
    run: it is logged once, and the embedding counts as refused. Refused embeddings may still be cached in memory.

    Args:
        folder: folder of the files, created if missing.
        limit_gb: maximum size of the folder in units of 10^9 bytes.
        memory_gb: maximum size in this process's memory, in the same unit.
        dtype: type of stored values, `float16` or `float32`.

    Attributes:
        hits: number of look-ups by this process that found an embedding.
        misses: number of look-ups that found none.
        refused: number of embeddings not stored on disk, for lack of space or a failure to write.

    Raises:
        ValueError: for an unknown dtype.
    """

    def __init__(self, folder: str, *, limit_gb: float = 16.0, memory_gb: float = 4.0, dtype: str = "float16") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"expected dtype {' or '.join(DTYPES)}, received {dtype!r}: name one of the two")
        self.folder = Path(folder).expanduser().absolute()
        self.limit_gb = limit_gb
        self.memory_gb = memory_gb
        self.dtype = dtype
        self.hits = self.misses = self.refused = 0
        self._memory: dict[bytes, torch.Tensor] = {}
        self._memory_bytes = 0
        self._partial_file = self.folder / ".partial"
        self._opened = False
        self._disk_bytes = self._bytes_since_measured = 0
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as a new cache with the same settings, without the embeddings in memory."""
        limits = {"limit_gb": self.limit_gb, "memory_gb": self.memory_gb}
        return partial(type(self), str(self.folder), dtype=self.dtype, **limits), ()

    def key(self, namespace: str, image: torch.Tensor) -> bytes:
        """Return the key of an image's embedding.

        Args:
            namespace: all that the embedding depends on besides the image: encoder, size, precision.
            image: of any shape, dtype and device.

        Returns:
            32 bytes, the SHA-256 of namespace, storage dtype, and the image's dtype, shape and exact bytes.
        """
        content = image.detach().as_subclass(torch.Tensor).cpu().contiguous()
        attributes = (_FORMAT, namespace, self.dtype, str(content.dtype), tuple(content.shape))
        digest = hashlib.sha256(repr(attributes).encode())
        digest.update(content.view(-1).view(torch.uint8).numpy().data)  # as bytes: NumPy has no bfloat16
        return digest.digest()

    def get(self, key: bytes) -> torch.Tensor | None:
        """Look up an embedding, and count the hit or miss.

        Args:
            key: from `key`.

        Returns:
            a CPU tensor of the storage dtype, not to be modified; None after a miss.

        Raises:
            OSError: when the folder cannot be created, written or locked.
        """
        embedding = self._memory.get(key)
        if embedding is None:
            self._open()
            embedding = self._read(key)
            if embedding is not None:
                self._keep_in_memory(key, embedding)
        if embedding is None:
            self.misses += 1
        else:
            self.hits += 1
        return embedding

    def put(self, key: bytes, embedding: torch.Tensor) -> torch.Tensor:
        """Store an embedding, unless it is stored already or there is no space.

        Args:
            key: from `key`.
            embedding: of any shape, floating-point dtype and device.

        Returns:
            the embedding that later hits return: a CPU tensor of the storage dtype, not to be modified. If another
            process has stored one for this key, it is that one, else the argument, rounded.

        Raises:
            ValueError: when a value is not finite, or beyond the range of the storage dtype.
            OSError: when the folder cannot be created, written or locked.
        """
        if key in self._memory:
            return self._memory[key]
        rounded = self._round(embedding)
        self._open()
        stored, on_disk = self._store(key, rounded)
        self._keep_in_memory(key, stored)
        self.refused += not on_disk
        return stored

    def describe(self) -> str:
        """Return one line with the folder, the number and size of the embeddings in it, and this run's look-ups."""
        sizes = list(entry_sizes(self.folder))
        refused = f", found no room for {self.refused}" if self.refused else ""
        return (
            f"embedding cache {self.folder}: {len(sizes)} embeddings, {sum(sizes) / GB:.2f} of {self.limit_gb:g} GB; "
            f"this run looked up {self.hits + self.misses}, encoded {self.misses}{refused}"
        )

    def _round(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return a copy in the storage dtype, after checking that all values are finite."""
        embedding = embedding.detach().as_subclass(torch.Tensor)
        # A tensor made in inference mode cannot be saved for a later backward pass.
        with torch.inference_mode(False):
            rounded = torch.empty(embedding.shape, dtype=DTYPES[self.dtype]).copy_(embedding)
        largest = _largest_magnitude(embedding)
        if not math.isfinite(largest):
            raise ValueError(
                "expected an embedding of finite values, received nan or infinity, which no storage dtype keeps: "
                "check the image and the encoder's weights"
            )
        if not math.isfinite(_largest_magnitude(rounded)):
            raise ValueError(
                f"expected an embedding within {self.dtype}'s range of {torch.finfo(rounded.dtype).max:g}, received "
                f"values up to {largest:g}: store with dtype 'float32', or give --cache_dir '$None' for no cache"
            )
        return rounded

    def _keep_in_memory(self, key: bytes, embedding: torch.Tensor) -> None:
        """Keep an embedding in memory if there is space."""
        if self._memory_bytes + embedding.nbytes <= self.memory_gb * GB:
            self._memory[key] = embedding
            self._memory_bytes += embedding.nbytes

    def _open(self) -> None:
        """Create the folder, check that it can be written, and measure it, at the first call only."""
        if self._opened:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder):
                self._partial_file.write_bytes(b"any")
                self._partial_file.unlink()
        except (OSError, NotImplementedError) as error:
            raise OSError(
                f"expected a folder that can be made, written and locked, to keep image embeddings in, received "
                f"{self.folder} ({type(error).__name__}: {error}): give --cache_dir another folder, or '$None' for none"
            ) from error
        self._disk_bytes = sum(entry_sizes(self.folder))
        self._opened = True

    def _read(self, key: bytes) -> torch.Tensor | None:
        """Read and verify an embedding's file; return None if it is missing or damaged."""
        path = entry_path(self.folder, key)
        try:
            with path.open("rb", buffering=0) as file:
                content = np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8)
                n_read = file.readinto(content.data)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("cannot read %s (%s): encoding anew", path, error)
            return None
        embedding = unpack(content[:n_read], key, DTYPES[self.dtype])
        if embedding is None:
            logger.warning("%s is damaged: encoding anew", path)
        return embedding

    def _store(self, key: bytes, embedding: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Write an embedding if it is not stored and there is space; return the valid one and whether it is on disk."""
        path, content = entry_path(self.folder, key), pack(embedding, key)
        try:
            with locked(self.folder):
                stored = self._read(key)
                if stored is not None:
                    return stored, True
                added_bytes = len(content) - size_in_bytes(path)  # a damaged file is replaced
                if self._disk_bytes + added_bytes > self.limit_gb * GB:
                    return embedding, False
                path.parent.mkdir(exist_ok=True)
                self._partial_file.write_bytes(content)
                self._partial_file.replace(path)
                self._count(added_bytes)
        except OSError as error:
            if not self._warned:
                logger.warning("cannot write to %s (%s): going on without storing what fails", self.folder, error)
            self._warned = True
            return embedding, False
        return embedding, True

    def _count(self, n_bytes: int) -> None:
        """Add to the folder's size; from time to time, measure what other processes have added."""
        self._disk_bytes += n_bytes
        self._bytes_since_measured += n_bytes
        if self._bytes_since_measured > self.limit_gb * GB / _RECOUNTS:
            self._disk_bytes, self._bytes_since_measured = sum(entry_sizes(self.folder)), 0


class BlankImageCache:
    """A cache of the last blank image's embedding, in place of an `EmbeddingCache` and with its methods.

    A volume may have many blank slices; they are encoded once. Nothing is rounded.
    """

    def __init__(self) -> None:
        self._blank: tuple[bytes, torch.Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as an empty cache."""
        return type(self), ()

    def key(self, namespace: str, image: torch.Tensor) -> bytes:
        """Return a key of a blank image's single value, and for any other image a random one that never hits.

        Args:
            namespace: all that the embedding depends on besides the image.
            image: of any shape, dtype and device.
        """
        smallest, largest = image.aminmax()
        if smallest == largest:
            return f"blank {namespace} {tuple(image.shape)} {image.dtype} {float(largest)!r}".encode()
        return os.urandom(32)

    def get(self, key: bytes) -> torch.Tensor | None:
        """Return the embedding of that key, or None."""
        return self._blank[1] if self._blank is not None and self._blank[0] == key else None

    def put(self, key: bytes, embedding: torch.Tensor) -> torch.Tensor:
        """Keep the embedding if its image is blank, and return it."""
        if key.startswith(b"blank "):
            self._blank = (key, embedding.clone())  # a view would keep the whole batch in memory
        return embedding


class EmbeddingCacheReport:
    """Ignite handler that logs content and use of the network's embedding caches when the engine has completed.

    Args:
        network: any module; each submodule's attribute `cache` is reported if it is an `EmbeddingCache`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def attach(self, engine: Engine) -> None:
        """Register the handler on an engine."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, _: Engine) -> None:
        """Log one line per cache."""
        for module in self.network.modules():
            cache = getattr(module, "cache", None)
            if isinstance(cache, EmbeddingCache):
                logger.info(cache.describe())


def _largest_magnitude(embedding: torch.Tensor) -> float:
    """Return the largest magnitude of an embedding, nan if any value is nan."""
    smallest, largest = embedding.aminmax()
    return float(torch.maximum(-smallest, largest))
