"""Reproducible zip archives, and their list in the format of MONAI's model zoo."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from components.base.atomic_write import write_atomically

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold
_MODE = 0o644
FILE_LIMIT = 25 * 10**6  # bytes, the zoo's limit for each file


def write_archive(root: Path, path: Path) -> Path:
    """Zip a folder, so that the same content always gives the same bytes.

    Args:
        root: folder to pack, which becomes the archive's one top-level folder.
        path: the archive, replaced in one step.

    Returns:
        `path`.

    Raises:
        ValueError: if there is a symbolic link, or a file larger than 25 MB.
    """
    files = sorted(file for file in root.rglob("*") if file.is_symlink() or not file.is_dir())
    for file in files:
        name = file.relative_to(root)
        if file.is_symlink():
            raise ValueError(
                f"{name} is a symbolic link: expected a file of its own, as archives are unpacked anywhere"
            )
        if file.stat().st_size > FILE_LIMIT:
            raise ValueError(
                f"{name} has {file.stat().st_size / 1e6:.1f} MB: expected at most {FILE_LIMIT / 1e6:.0f} MB, "
                "the model zoo's limit; list larger ones in large_files.yml"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for file in files:
            entry = zipfile.ZipInfo(file.relative_to(root.parent).as_posix(), date_time=_EPOCH)
            entry.external_attr = _MODE << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, file.read_bytes())
    return path


def write_model_info(archives: Sequence[Path], path: Path, *, base_url: str) -> Path:
    """Write the zoo's list of archives; entries of other archives are kept.

    Args:
        archives: archives named `<bundle>_v<version>.zip`.
        path: file of the list.
        base_url: address of the archives' folder; without one, `source` is the file's name alone.

    Returns:
        `path`.
    """
    known = json.loads(path.read_text()) if path.is_file() else {}
    base = f"{base_url.rstrip('/')}/" if base_url else ""
    for archive in archives:
        checksum = hashlib.sha1(archive.read_bytes()).hexdigest()  # the zoo's choice
        known[archive.stem] = {"checksum": checksum, "source": f"{base}{archive.name}"}
    with write_atomically(path) as partial:
        partial.write_text(json.dumps(dict(sorted(known.items())), indent=4) + "\n")
    return path
