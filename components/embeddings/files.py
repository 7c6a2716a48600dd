"""How embeddings lie in a folder: one `.npy` file each, with its key and a checksum behind it.

LMDB reads no faster, and its map of a truncated file kills the process (SIGBUS), where here damage costs one embedding.
diskcache takes about three times as long to write; safetensors does not, but has no checksum either. CRC-32, less than
half the price of a cryptographic hash, guards against accidents.
"""

import io
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

_LOCK_TIMEOUT_S = 60.0
_LOCK_POLL_S = 0.001
_CHECKSUM_BYTES = 4
_MAX_NPY_HEADER_BYTES = 4096


def locked(folder: Path) -> AbstractContextManager[Any]:
    """Give the folder's lock, to be held while writing; a holder that hangs is an OSError after a minute."""
    return FileLock(folder / ".lock", timeout=_LOCK_TIMEOUT_S).acquire(poll_interval=_LOCK_POLL_S)


def entry_path(folder: Path, key: bytes) -> Path:
    """Return an embedding's file, in one of 256 subfolders."""
    return folder / key.hex()[:2] / f"{key.hex()}.npy"


def entry_sizes(folder: Path) -> Iterator[int]:
    """Give the sizes in bytes of the folder's embeddings."""
    return map(size_in_bytes, folder.glob("[0-9a-f][0-9a-f]/*.npy"))


def size_in_bytes(path: Path) -> int:
    """Return a file's size, 0 if there is none (a user may be emptying the folder)."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def pack(embedding: torch.Tensor, key: bytes) -> memoryview:
    """Lay out an embedding's file: NumPy's format, which holds dtype and shape, the key, and the CRC-32 of both.

    Args:
        embedding: on the CPU, of any shape and of a dtype that NumPy has.
        key: of the image and its encoder, 32 bytes.
    """
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, embedding.numpy(), version=(1, 0), allow_pickle=False)
    buffer.write(key)
    checksum = zlib.crc32(buffer.getbuffer())
    buffer.write(checksum.to_bytes(_CHECKSUM_BYTES, "little"))
    return buffer.getbuffer()


def unpack(content: np.ndarray, key: bytes, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the embedding in a file's bytes, without copying; None unless whole, of that key and of that dtype.

    Args:
        content: uint8, the file's bytes.
        key: as it was packed with.
        dtype: as it was packed with.
    """
    checked, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if zlib.crc32(checked.data) != int.from_bytes(checksum.tobytes(), "little"):
        return None
    header = io.BytesIO(checked[:_MAX_NPY_HEADER_BYTES].tobytes())
    try:
        np.lib.format.read_magic(header)
        shape, _, stored_dtype = np.lib.format.read_array_header_1_0(header)
        with torch.inference_mode(False):
            values = torch.from_numpy(checked[header.tell() : -len(key)].view(stored_dtype))
            embedding = values.reshape(shape)
    except Exception:  # a whole file, but none of ours, whose header can be wrong in many ways
        return None
    return embedding if embedding.dtype == dtype and checked[-len(key) :].tobytes() == key else None
