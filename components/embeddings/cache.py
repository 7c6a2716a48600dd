"""A store of a frozen encoder's embeddings, in memory and on disk, addressed by what was encoded.

The key is SHA-256, half the price of BLAKE2b on CPUs with instructions for it. One process at a time writes, under a
file lock that the system releases when its holder dies. So the first to store an embedding wins, and a killed process
leaves at most one partial file, which the next write replaces. Nothing is synced to the disk: what a power cut tears
fails its checksum. Nothing is evicted: least-recently-used eviction would leave an epoch longer than the limit without
any hit.
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

from components.embeddings.files import entry_path, entry_sizes, locked, pack, size_in_bytes, unpack

logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "float32": torch.float32}
GB = 1e9

_FORMAT = 1  # part of every key: files of another format are never found
_PARTIAL_NAME = ".partial"
_RECOUNTS = 64  # a process counts the folder anew whenever it has added this fraction of the limit


class EmbeddingCache:
    """Embeddings by content: of the same encoder and the same image, bit for bit what was stored first.

    Several processes may share a folder, and may be killed at any moment. A damaged file counts as a miss and is
    replaced. Nothing is opened, read or made before the first look-up; copies and pickles hold the settings alone.

    At the limit nothing more is admitted. Other processes' additions are noticed late, so that each may exceed
    the limit by a 64th of it. Once the folder has been opened, a failure to write (a full disk, say) does not end the
    run: it is logged once, and the embedding counts as refused. What the disk refuses may still find room in memory.

    Args:
        folder: where the files are, made if missing; None to keep embeddings in memory only.
        limit_gb: most that the folder may hold, in units of 10^9 bytes.
        memory_gb: most that this process keeps in memory, likewise.
        dtype: of stored values, `float16` or `float32`.

    Attributes:
        hits: embeddings looked up and found by this process.
        misses: embeddings looked up and not found.
        refused: embeddings not admitted for lack of room on disk, or in memory if there is no folder.

    Raises:
        ValueError: for another dtype.
    """

    def __init__(
        self, folder: str | None, *, limit_gb: float = 16.0, memory_gb: float = 4.0, dtype: str = "float16"
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"expected dtype {' or '.join(DTYPES)}, received {dtype!r}: name one of the two")
        self.folder = None if folder is None else Path(folder).expanduser().absolute()
        self.limit_gb = limit_gb
        self.memory_gb = memory_gb
        self.dtype = dtype
        self.hits = self.misses = self.refused = 0
        self._memory: dict[bytes, torch.Tensor] = {}
        self._memory_bytes = 0
        self._opened = False
        self._disk_bytes = self._uncounted_bytes = 0
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as a new cache of the same settings: embeddings in memory stay where they are."""
        folder = None if self.folder is None else str(self.folder)
        limits = {"limit_gb": self.limit_gb, "memory_gb": self.memory_gb}
        return partial(type(self), folder, dtype=self.dtype, **limits), ()

    def key(self, namespace: str, image: torch.Tensor) -> bytes:
        """Name what is encoded and by what.

        Args:
            namespace: all that an embedding depends on besides the image: encoder, size, precision.
            image: of any shape, dtype and device.

        Returns:
            32 bytes, the SHA-256 of namespace, storage dtype, and the image's dtype, shape and exact bytes.
        """
        content = image.detach().as_subclass(torch.Tensor).cpu().contiguous()
        described = (_FORMAT, namespace, self.dtype, str(content.dtype), tuple(content.shape))
        digest = hashlib.sha256(repr(described).encode())
        digest.update(content.view(-1).view(torch.uint8).numpy().data)  # as bytes: NumPy has no bfloat16
        return digest.digest()

    def get(self, key: bytes) -> torch.Tensor | None:
        """Look an embedding up, and count whether it was there.

        Args:
            key: from `key`.

        Returns:
            a CPU tensor of the storage dtype, not to be written to; or None.

        Raises:
            OSError: when the folder cannot be made, written or locked.
        """
        embedding = self._memory.get(key)
        if embedding is None and self.folder is not None:
            self._open(self.folder)
            embedding = self._read(self.folder, key)
            if embedding is not None:
                self._remember(key, embedding)
        if embedding is None:
            self.misses += 1
        else:
            self.hits += 1
        return embedding

    def put(self, key: bytes, embedding: torch.Tensor) -> torch.Tensor:
        """Store an embedding, unless it is there already or finds no room.

        Args:
            key: from `key`.
            embedding: of any shape, floating-point dtype and device.

        Returns:
            what a later hit will return, bit for bit: a CPU tensor of the storage dtype, not to be written to. It is
            another process's where that one was first, and the argument rounded where there is no room.

        Raises:
            ValueError: when a value is not finite, or does not fit the storage dtype.
            OSError: when the folder cannot be made, written or locked.
        """
        if key in self._memory:
            return self._memory[key]
        rounded = self._round(embedding)
        if self.folder is None:
            admitted = self._remember(key, rounded)
        else:
            self._open(self.folder)
            rounded, admitted = self._store(self.folder, key, rounded)
            self._remember(key, rounded)
        self.refused += not admitted
        return rounded

    def size_bytes(self) -> int:
        """Count what is stored, in bytes on disk, or in memory if there is no folder."""
        return self._memory_bytes if self.folder is None else sum(entry_sizes(self.folder))

    def describe(self) -> str:
        """Say in one line where the embeddings are, how many and how large, and what this run made of them."""
        if self.folder is None:
            place, n_entries, n_bytes, limit_gb = "in memory", len(self._memory), self._memory_bytes, self.memory_gb
        else:
            sizes = list(entry_sizes(self.folder))
            place, n_entries, n_bytes, limit_gb = str(self.folder), len(sizes), sum(sizes), self.limit_gb
        refused = f", found no room for {self.refused}" if self.refused else ""
        return (
            f"embedding cache {place}: {n_entries} embeddings, {n_bytes / GB:.2f} of {limit_gb:g} GB; "
            f"this run looked up {self.hits + self.misses}, encoded {self.misses}{refused}"
        )

    def _round(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return a copy in the storage dtype, checked to be finite."""
        embedding = embedding.detach().as_subclass(torch.Tensor)
        # Tensors made in inference mode could not be saved for a later backward pass.
        with torch.inference_mode(False):
            rounded = torch.empty(embedding.shape, dtype=DTYPES[self.dtype]).copy_(embedding)
        largest = _largest(embedding)
        if not math.isfinite(largest):
            raise ValueError(
                "expected an embedding of finite values, received nan or infinity, which no storage dtype keeps: "
                "check the image and the encoder's weights"
            )
        if not math.isfinite(_largest(rounded)):
            raise ValueError(
                f"expected an embedding within {self.dtype}'s range of {torch.finfo(rounded.dtype).max:g}, received "
                f"values up to {largest:g}: store with dtype 'float32', or give --cache_dir '$None' for no cache"
            )
        return rounded

    def _remember(self, key: bytes, embedding: torch.Tensor) -> bool:
        """Keep an embedding in memory if there is room, and tell whether there was."""
        if self._memory_bytes + embedding.nbytes > self.memory_gb * GB:
            return False
        self._memory[key] = embedding
        self._memory_bytes += embedding.nbytes
        return True

    def _open(self, folder: Path) -> None:
        """Make the folder, prove that it can be written, and count what it holds, once."""
        if self._opened:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                (folder / _PARTIAL_NAME).write_bytes(b"any")
                (folder / _PARTIAL_NAME).unlink()
        except (OSError, NotImplementedError) as error:
            raise OSError(
                f"expected a folder that can be made, written and locked, to keep image embeddings in, received "
                f"{folder} ({type(error).__name__}: {error}): give --cache_dir another folder, or '$None' for none"
            ) from error
        self._disk_bytes = sum(entry_sizes(folder))
        self._opened = True

    def _read(self, folder: Path, key: bytes) -> torch.Tensor | None:
        """Read and verify an embedding; return None where it is missing or damaged."""
        path = entry_path(folder, key)
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

    def _store(self, folder: Path, key: bytes, embedding: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Write an embedding unless it is there or finds no room; return what holds, and whether it is on disk."""
        path, content = entry_path(folder, key), pack(embedding, key)
        try:
            with locked(folder):
                stored = self._read(folder, key)
                if stored is not None:
                    return stored, True
                added_bytes = len(content) - size_in_bytes(path)  # a damaged file is replaced
                if self._disk_bytes + added_bytes > self.limit_gb * GB:
                    return embedding, False
                path.parent.mkdir(exist_ok=True)
                (folder / _PARTIAL_NAME).write_bytes(content)
                (folder / _PARTIAL_NAME).replace(path)
                self._count(folder, added_bytes)
        except OSError as error:
            if not self._warned:
                logger.warning("cannot write to %s (%s): going on without storing what fails", folder, error)
            self._warned = True
            return embedding, False
        return embedding, True

    def _count(self, folder: Path, n_bytes: int) -> None:
        """Add to what the folder holds; from time to time, count what other processes have added too."""
        self._disk_bytes += n_bytes
        self._uncounted_bytes += n_bytes
        if self._uncounted_bytes > self.limit_gb * GB / _RECOUNTS:
            self._disk_bytes, self._uncounted_bytes = sum(entry_sizes(folder)), 0


class BlankImages:
    """The embedding of the last blank image, for a network without an `EmbeddingCache`, whose methods these are.

    Slices without anything in them, which a volume may have many of, are thus encoded once. Nothing is rounded.
    """

    def __init__(self) -> None:
        self._blank: tuple[bytes, torch.Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as a new memory."""
        return type(self), ()

    def key(self, namespace: str, image: torch.Tensor) -> bytes:
        """Name a blank image by its one value, and any other by a name that never comes again.

        Args:
            namespace: all that an embedding depends on besides the image.
            image: of any shape, dtype and device.

        Returns:
            the name.
        """
        smallest, largest = image.aminmax()
        if smallest == largest:
            return f"blank {namespace} {tuple(image.shape)} {image.dtype} {float(largest)!r}".encode()
        return os.urandom(32)

    def get(self, key: bytes) -> torch.Tensor | None:
        """Return the embedding of that name, or None."""
        return self._blank[1] if self._blank is not None and self._blank[0] == key else None

    def put(self, key: bytes, embedding: torch.Tensor) -> torch.Tensor:
        """Keep a blank image's embedding, and return it as it is."""
        if key.startswith(b"blank "):
            self._blank = (key, embedding.clone())  # rather than keep its whole batch
        return embedding


class EmbeddingCacheReport:
    """Ignite handler that logs, when the engine has completed, what the network's embedding caches hold and saved.

    Args:
        network: any module; each submodule's attribute `cache` is reported if it is an `EmbeddingCache`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def attach(self, engine: Engine) -> None:
        """Register the handler on an engine."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, _: Engine) -> None:
        """Log one line a cache."""
        for module in self.network.modules():
            cache = getattr(module, "cache", None)
            if isinstance(cache, EmbeddingCache):
                logger.info(cache.describe())


def _largest(embedding: torch.Tensor) -> float:
    """Return the largest magnitude of an embedding, nan if any value is."""
    smallest, largest = embedding.aminmax()
    return float(torch.maximum(-smallest, largest))
