"""Where bundles lie: those that come with the package, and a user's own."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

_PACKAGE = Path(__file__).parent
# in the wheel they lie within the package, in a clone beside it
SHIPPED = next(folder for folder in (_PACKAGE / "bundles", _PACKAGE.parent / "bundles") if folder.is_dir())
DEFAULT = "linearhead_acdc"
INFERENCE, TRAIN, CORRECT = "inference.json", "train.json", "correct.json"
DATA_FILE = "configs/data.json"  # only in bundles for a user's own data
MODEL = "models/model.pt"


def shipped_bundles() -> list[str]:
    """Return the names of the bundles that come with the package and segment."""
    return sorted(path.parents[1].name for path in SHIPPED.glob(f"*/configs/{INFERENCE}"))


def is_bundle(folder: Path) -> bool:
    """Return whether a folder has a bundle's configs."""
    return (folder / "configs/metadata.json").is_file()


def is_shipped(folder: Path) -> bool:
    """Return whether a bundle is one that came with the package."""
    return folder.resolve().parent == SHIPPED.resolve()


def find_bundle(bundle: str | Path, needs: str = INFERENCE) -> Path:
    """Return the folder of a bundle.

    Args:
        bundle: a bundle's folder; or a name, of a folder in the working directory or else of a bundle that comes with
            the package.
        needs: the config that it must have.

    Returns:
        the folder, as given if it is one.

    Raises:
        FileNotFoundError: if there is no such bundle, or the folder is none.
        ValueError: if the bundle has no such config.
    """
    given = Path(bundle).expanduser()
    folder = given if is_bundle(given) or len(given.parts) != 1 else SHIPPED / given
    if not is_bundle(folder):
        if given.is_dir():
            raise FileNotFoundError(f"{given} is no bundle: expected a folder with configs/metadata.json")
        nearest = difflib.get_close_matches(given.name, shipped_bundles(), n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise FileNotFoundError(
            f"there is no bundle {bundle}: expected a bundle's folder or one of {', '.join(shipped_bundles())}{hint}"
        )
    if not (folder / "configs" / needs).is_file():
        raise ValueError(f"{folder} has no configs/{needs}: choose another bundle, such as {DEFAULT}")
    return folder


def own_copy(bundle: Path, copy: Path | None = None) -> Path:
    """Return a bundle's folder in which training may write: a copy of one that came with the package.

    Args:
        bundle: a bundle's folder.
        copy: where the copy is made unless it is there; None for the bundle's name in the working directory.

    Raises:
        FileExistsError: if the copy's place is taken by something that is no bundle.
    """
    copy = copy or Path(bundle.name)
    if not is_shipped(bundle) or is_bundle(copy):
        return copy if is_shipped(bundle) else bundle
    if copy.exists():
        raise FileExistsError(f"{copy.absolute()} is in the way of a copy of the bundle: rename it")
    partial = copy.with_name(f".{copy.name}.partial")
    for pattern in ("LICENSE", "large_files.yml", "configs/[!.]*", "docs/[!.]*"):
        for path in filter(Path.is_file, bundle.glob(pattern)):
            target = partial / path.relative_to(bundle)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    partial.rename(copy)
    return copy
