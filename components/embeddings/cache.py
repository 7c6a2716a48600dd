"""A cache of a frozen encoder's embeddings, in memory and on disk, keyed by the image and the encoder.

A file gets its name once it is whole, so nothing need be locked. Syncing it to the disk, as `write_atomically` does,
would take two to seven times as long; instead, a file damaged by a power cut fails its checksum. Nothing is evicted,
since least-recently-used eviction yields no hit in epochs larger than the limit. Alternatives: LMDB reads no faster,
and a truncated file kills the process that reads its memory map (SIGBUS). diskcache takes three times as long to write.
"""

import hashlib
import io
import logging
import math
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import nn

logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "float32": torch.float32}
GB = 1e9
_FORMAT = 2  # part of every key, so files of another format are never hit
_RECOUNTS = 64  # after adding this fraction of the limit, a process measures the folder again


class EmbeddingCache:
    """A cache of embeddings; a hit has exactly the bits that some process stored for that image and encoder.

    Processes may share a folder, and may be killed at any time. A damaged file counts as a miss and is replaced. What
    was stored first stays, and slower processes take it over. Only those that store the same image within the same
    milliseconds may each keep their own in memory; the last one's file stays. Nothing is created, opened or read before
    the first look-up. Copies and pickles hold the settings only.

    At the limit nothing more is stored. A process notices late what others add, so each may exceed the limit by a 64th
    of it. Once the folder is open, a failure to write, such as a full disk, is logged once and does not end the run.

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
        self.limit_gb, self.memory_gb, self.dtype = limit_gb, memory_gb, dtype
        self.hits = self.misses = self.refused = 0
        self._memory: dict[bytes, torch.Tensor] = {}
        self._free_memory = memory_gb * GB
        self._free, self._until_recount = 0.0, -1.0  # bytes up to the limit as last measured, and to add until the next
        self._opened = self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as a new cache with the same settings, without the embeddings in memory."""
        settings = {name: getattr(self, name) for name in ("folder", "limit_gb", "memory_gb", "dtype")}
        return partial(type(self), **settings), ()

    def key(self, namespace: str, image: torch.Tensor) -> bytes:
        """Return the key of an image's embedding: the SHA-256 of namespace, dtypes, shape and exact bytes.

        Args:
            namespace: all that the embedding depends on besides the image: encoder, size, precision.
            image: of any shape, dtype and device.
        """
        content = image.detach().as_subclass(torch.Tensor).cpu().contiguous()
        attributes = (_FORMAT, namespace, self.dtype, str(content.dtype), tuple(content.shape))
        digest = hashlib.sha256(repr(attributes).encode())  # takes half as long as BLAKE2b
        digest.update(content.view(-1).view(torch.uint8).numpy().data)  # as bytes: NumPy has no bfloat16
        return digest.digest()

    def get(self, key: bytes) -> torch.Tensor | None:
        """Return a key's embedding, on the CPU in the storage dtype, not to be modified; None after a miss.

        Raises:
            OSError: when the folder cannot be created or written.
        """
        embedding = self._find(key)
        self.hits += embedding is not None
        self.misses += embedding is None
        return embedding

    def put(self, key: bytes, embedding: torch.Tensor) -> torch.Tensor:
        """Store a key's embedding, of any shape, floating-point dtype and device, if none is stored.

        Returns:
            what later look-ups find, as from `get`: the argument rounded, or what another process has stored.

        Raises:
            ValueError: when a value is not finite, or beyond the range of the storage dtype.
            OSError: when the folder cannot be created or written.
        """
        rounded = self._round(embedding)
        stored = self._find(key)
        if stored is not None:
            return stored
        self.refused += not self._write(key, rounded.numpy())
        return self._keep(key, rounded)

    def describe(self) -> str:
        """Return one line with the folder, the number and size of the embeddings in it, and this run's look-ups."""
        sizes = list(self._sizes())
        refused = f", found no room for {self.refused}" if self.refused else ""
        return (
            f"embedding cache {self.folder}: {len(sizes)} embeddings, {sum(sizes) / GB:.2f} of {self.limit_gb:g} GB; "
            f"this run looked up {self.hits + self.misses}, encoded {self.misses}{refused}"
        )

    @torch.inference_mode(False)  # a tensor made in inference mode cannot be saved for a later backward pass
    def _round(self, embedding: torch.Tensor) -> torch.Tensor:
        embedding = embedding.detach().as_subclass(torch.Tensor)
        rounded = torch.empty(embedding.shape, dtype=DTYPES[self.dtype]).copy_(embedding)
        if not all(map(math.isfinite, rounded.aminmax())):
            raise ValueError(
                f"expected an embedding of finite values in {self.dtype}'s range of {torch.finfo(rounded.dtype).max:g},"
                f" received values up to {float(embedding.abs().max()):g}: if nan or infinite, check the image and the "
                "encoder's weights; else store with dtype 'float32', or give --cache_dir '$None' for no cache"
            )
        return rounded

    def _find(self, key: bytes) -> torch.Tensor | None:
        if key in self._memory:
            return self._memory[key]
        if not self._opened:
            self._open()
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                array = np.lib.format.read_array(file)
                if file.read() != _checksum(key, array) or array.dtype != self.dtype:
                    raise ValueError("it is damaged")
        except FileNotFoundError:
            return None
        except Exception as error:  # NumPy raises many kinds for a damaged header
            logger.warning("cannot read %s (%s): encoding anew", path, error)
            return None
        with torch.inference_mode(False):
            return self._keep(key, torch.from_numpy(array))

    def _keep(self, key: bytes, embedding: torch.Tensor) -> torch.Tensor:
        if embedding.nbytes <= self._free_memory:
            self._memory[key] = embedding
            self._free_memory -= embedding.nbytes
        return embedding

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise OSError(
                f"expected a folder that can be made and written, to keep image embeddings in, received "
                f"{self.folder} ({type(error).__name__}: {error}): give --cache_dir another folder, or '$None' for none"
            ) from error
        self._opened = True

    def _path(self, key: bytes) -> Path:
        return self.folder / key.hex()[:2] / f"{key.hex()}.npy"

    def _sizes(self) -> Iterator[int]:
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):  # with the partial files that killed processes leave
            with suppress(OSError):  # a user may be emptying the folder
                yield path.stat().st_size

    def _write(self, key: bytes, array: np.ndarray) -> bool:
        """Write a file, whole or not at all; return whether there was space and no failure."""
        path = self._path(key)
        if self._until_recount < 0:
            limit = self.limit_gb * GB
            self._free, self._until_recount = limit - sum(self._sizes()), limit / _RECOUNTS
        content = io.BytesIO()
        np.save(content, array)
        content.write(_checksum(key, array))
        partial_file = path.with_suffix(f".partial-{os.getpid()}")
        try:
            if array.nbytes > self._free and not path.exists():  # a damaged file is replaced
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            partial_file.write_bytes(content.getbuffer())
            partial_file.replace(path)
        except OSError as error:
            if not self._warned:
                logger.warning("cannot write to %s (%s): going on without storing what fails", self.folder, error)
            self._warned = True
            with suppress(OSError):
                partial_file.unlink()
            return False
        self._free -= array.nbytes
        self._until_recount -= array.nbytes
        return True


def _checksum(key: bytes, array: np.ndarray) -> bytes:
    """Return the CRC-32 of a key and an array's dtype, shape and values, which follows the array in its file."""
    return zlib.crc32(array.data, zlib.crc32(repr((key, array.dtype.str, array.shape)).encode())).to_bytes(4)


class BlankImageCache(dict[bytes, torch.Tensor]):
    """A cache of the last blank image's embedding, not rounded, used like an `EmbeddingCache`.

    A volume may have many blank slices, each shown in up to 8 equal views; they are encoded once.
    """

    def key(self, namespace: str, image: torch.Tensor) -> bytes:
        """Return a key of a blank image's single value, and for any other image a random one that never hits."""
        smallest, largest = image.aminmax()
        blank = f"blank {namespace} {tuple(image.shape)} {image.dtype} {float(largest)!r}"
        return blank.encode() if smallest == largest else os.urandom(32)

    def put(self, key: bytes, embedding: torch.Tensor) -> torch.Tensor:
        """Keep the embedding if its image is blank, and return it."""
        if key.startswith(b"blank "):
            self.clear()
            self[key] = embedding.clone()  # a view would keep the whole batch in memory
        return embedding


class EmbeddingCacheReport:
    """Ignite handler that logs content and use of the network's embedding caches when the engine has completed.

    Args:
        network: any module; each submodule's attribute `cache` is reported if it is an `EmbeddingCache`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def attach(self, engine: Engine) -> None:
        """Have an engine log one line per cache when it has completed."""
        for module in self.network.modules():
            cache = getattr(module, "cache", None)
            if isinstance(cache, EmbeddingCache):
                engine.add_event_handler(Events.COMPLETED, lambda _, cache=cache: logger.info(cache.describe()))
