"""The files of an embedding cache: one `.npy` file per embedding, followed by its key and a checksum.

Alternatives: LMDB reads no faster, and reading a truncated file through its memory map kills the process (SIGBUS),
whereas here a damaged file costs one embedding. diskcache takes about three times as long to write. safetensors is as
fast, but has no checksum either. The checksum is CRC-32, which detects accidental damage and costs less than half of a
cryptographic hash.
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
    """Acquire the folder's lock for writing; raises an OSError if it is not free within a minute."""
    return FileLock(folder / ".lock", timeout=_LOCK_TIMEOUT_S).acquire(poll_interval=_LOCK_POLL_S)


def entry_path(folder: Path, key: bytes) -> Path:
    """Return the path of an embedding's file, in one of 256 subfolders."""
    return folder / key.hex()[:2] / f"{key.hex()}.npy"


def entry_sizes(folder: Path) -> Iterator[int]:
    """Yield the size in bytes of each embedding's file in the folder."""
    return map(size_in_bytes, folder.glob("[0-9a-f][0-9a-f]/*.npy"))


def size_in_bytes(path: Path) -> int:
    """Return the size of a file, 0 if it is missing (a user may be emptying the folder)."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def pack(embedding: torch.Tensor, key: bytes) -> memoryview:
    """Return the content of an embedding's file: NumPy's format (with dtype and shape), the key, the CRC-32 of both.

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
    """Return the embedding in a file's content, without a copy; None if damaged, or of another key or dtype.

    Args:
        content: uint8, the file's bytes.
        key: the expected key.
        dtype: the expected dtype.
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
    except Exception:  # an intact file that is no embedding; its header can be invalid in many ways
        return None
    return embedding if embedding.dtype == dtype and checked[-len(key) :].tobytes() == key else None
