"""What a request may contain: settings that the server offers, plain names, its own origins.

It imports nothing of MONAI Label, nor what MONAI Label needs.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".jpg", ".png", ".tif")  # of images that MONAI Label stores and a bundle reads
TAG = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
MODELS = ["model.pt"]  # beside it lies a bundle's encoder, which segments nothing
DTYPES = ["uint8", "uint16", "int16", "int32", "float32"]
LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR"]

# Settings that clients of MONAI Label send besides those that it lists. A list gives the choices; the type of another
# value is the type of the setting.
_SHARED: dict[str, Any] = {"client_id": "", "device": ["cpu", "cuda"], "multi_gpu": True, "gpus": "all"}
FOR_TRAINING = _SHARED | {
    "run_id": ["", "run"],
    "tracking": ["", "None"],
    "tracking_uri": [""],
    "tracking_experiment_name": [""],
}
FOR_INFERENCE = _SHARED | {
    "result_extension": [*ENDINGS, ".seg.nrrd"],
    "result_dtype": DTYPES,
    "result_compress": False,
    "restore_label_idx": False,
    "largest_cc": False,
    "save_label": False,
    "label_tag": "original",
    "label_info": [],
    "logging": LEVELS,
}
POINTS = ((0, 0, 0),)  # the type of a setting whose values are clicks on voxels
FOR_BATCHES = FOR_INFERENCE | {"max_workers": 1, "max_batch_size": 0}
FOR_SAMPLES = {"client_id": "", "label_tag": "final"}

_LIMITS = {"max_epochs": (1, 10_000), "val_split": (0, 0.9), "max_workers": (0, 64), "max_batch_size": (0, 10**6)}
_PATTERNS = {
    "gpus": r"all|\d{1,2}(,\d{1,2}){0,15}",
    "client_id": r"\w[\w .:@-]{0,127}",
    "label_tag": TAG,
    "label": r"\w[\w .:@-]{0,127}",
}
_FORMS = {
    "gpus": "'all', or numbers separated by commas",
    "client_id": "at most 128 letters, digits and some of ' .:@-_'",
    "label_tag": "at most 64 letters, digits, '_' and '-'",
    "label": "at most 128 letters, digits and some of ' .:@-_'",
}
_NAME = re.compile(r"\w[\w .()+,=-]{0,127}")
_UID = re.compile(r"\d+(\.\d+)*")
_QUERY = re.compile(r"(studies|series|instances)(/[\w,-][\w.,-]*)*")
_BYTES_OF_NAME = 200  # of the 255 that a file system allows, without the ending
_BYTES_OF_JSON = 65_536
_MOST_POINTS = 1000
_EVALUATED = ("$", "@", "%")  # how a MONAI config marks code, references and files
_OF_THE_SERVER = {"ts", "name", "path", "strategy", "predictions"}
_SEGMENT = {"name": str, "description": str, "model_name": str, "idx": int, "color": list}


class RefusalError(ValueError):
    """A request is refused; the message says what is expected."""


def plain_name(name: str) -> str:
    """Return a name that a file below the studies may have.

    Args:
        name: letters, digits and some marks.

    Raises:
        RefusalError: if it is a path, hidden, too long, or contains other characters.
    """
    is_plain = _NAME.fullmatch(name) and ".." not in name and name[-1] not in " ." and not ending_in(name)
    if not is_plain or len(name.encode(errors="replace")) > _BYTES_OF_NAME:
        raise RefusalError(
            "the name is not plain: expected letters, digits and some of ' .()+,=-_', at most 128 of them, no path "
            f"and none of the endings {', '.join(ENDINGS)}"
        )
    return name


def ending_in(name: str) -> str:
    """Return the first ending of an image that a name contains anywhere, or an empty text."""
    return next((ending for ending in ENDINGS if ending in name), "")


def ending_of(file: str | None, also: Collection[str] = ()) -> str:
    """Return the ending of a sent file's name.

    Args:
        file: the name; without one it is taken for `.nii.gz`.
        also: endings that are accepted besides those of images.

    Raises:
        RefusalError: if it has none that is accepted.
    """
    endings = (*ENDINGS, *also)
    found = next((ending for ending in endings if (file or ".nii.gz").lower().endswith(ending)), None)
    if found is None:
        raise RefusalError(f"the file has another name than an image: expected it to end in {', '.join(endings)}")
    return found


def is_uid(name: str) -> bool:
    """Return whether a name is a DICOM UID."""
    return len(name) <= 64 and _UID.fullmatch(name) is not None


def is_dicomweb_query(path: str) -> bool:
    """Return whether a path stays below a DICOMweb server's root."""
    return _QUERY.fullmatch(path.rstrip("/")) is not None


def is_below(path: Path, folder: Path) -> bool:
    """Return whether a path stays in a folder once links are followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def parse_object(text: str) -> dict[str, Any]:
    """Parse a form's JSON object.

    Raises:
        RefusalError: if it is not one, too long, or contains what a config would evaluate.
    """
    try:
        parsed = json.loads(text or "{}", parse_constant=_refuse_constant) if len(text) <= _BYTES_OF_JSON else None
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise RefusalError(f"expected a JSON object of at most {_BYTES_OF_JSON} characters")
    _refuse_code(parsed)
    return parsed


def parse_info(text: str) -> dict[str, Any]:
    """Parse notes on an image or a label, which MONAI Label keeps in its list.

    Raises:
        RefusalError: as for `parse_object`, or if it names what the server itself notes.
    """
    info = parse_object(text)
    if taken := sorted(info.keys() & _OF_THE_SERVER):
        raise RefusalError(f"the server itself notes {', '.join(taken)}: expected other names")
    if "label_info" in info:
        info["label_info"] = _checked_segments(info["label_info"])
    return info


def check_settings(given: Mapping[str, Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a request, if the server offers them.

    An empty text and a list of choices, which some clients send back, stand for the default.

    Args:
        given: the request's settings.
        offered: the type of each setting by an example, or its choices as a list.

    Raises:
        RefusalError: if a name is not offered, or a value has another type, range or choice.
    """
    if unknown := sorted(given.keys() - offered.keys()):
        raise RefusalError(f"no setting {', '.join(unknown)[:200]!r}: expected some of {', '.join(sorted(offered))}")
    return {
        name: _checked(name, value, offered[name])
        for name, value in given.items()
        if value not in ("", None) and not _is_of_choices(value, offered[name])
    }


def own_hosts(host: str, origins: Collection[str]) -> set[str] | None:
    """Return the names by which browsers may reach the server; None for any.

    Args:
        host: the address that the server listens at.
        origins: the addresses of other pages that may use it.
    """
    if not is_loopback(host):
        return None
    return {"127.0.0.1", "localhost", "::1", host} | {urlsplit(origin).hostname or "" for origin in origins}


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_origins(origins: Collection[str]) -> list[str]:
    """Return addresses of pages as browsers send them.

    Raises:
        ValueError: if one is not a scheme, a host and perhaps a port.
    """
    cleaned = [origin.strip().rstrip("/").lower() for origin in origins if origin.strip()]
    for origin in cleaned:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.hostname or f"{parts.scheme}://{parts.netloc}" != origin:
            raise ValueError(f"{origin} is no origin: expected addresses such as https://viewer.example:3000")
    return cleaned


def refuse_page(host: str, origin: str | None, hosts: Collection[str] | None, origins: Collection[str]) -> str | None:
    """Say why the page of another site may not ask.

    Args:
        host: the request's header `Host`.
        origin: its header `Origin`, which browsers send.
        hosts: the server's own names; None for any.
        origins: pages that may ask besides the server's own.

    Returns:
        the reason; None for the server's own pages and for programs.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if hosts is not None and name not in hosts:
        return "the server has another name: ask for it by its address, or start it with --origins"
    if origin is None or origin in origins or origin in (f"http://{host}", f"https://{host}"):
        return None
    return "a page of another site asks: start the server with its address in --origins"


def is_authorized(header: str, token: str) -> bool:
    """Return whether a header `Authorization` has the token, as bearer or as the password of any user."""
    kind, _, value = header.partition(" ")
    if kind.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(value.encode(), token.encode())


def _is_of_choices(value: Any, offered: Any) -> bool:
    return (
        isinstance(value, list) and isinstance(offered, list) and value != [] and all(one in offered for one in value)
    )


def _checked(name: str, value: Any, offered: Any) -> Any:
    """Return a setting's value in its type."""
    if name == "label_info":
        return _checked_segments(value)
    if name in _PATTERNS:
        if isinstance(value, str) and re.fullmatch(_PATTERNS[name], value):
            return value
        raise RefusalError(f"{name} has another form: expected {_FORMS[name]}")
    if offered == POINTS:
        return _checked_points(name, value)
    if isinstance(offered, bool):
        if isinstance(value, bool | int) and value in (0, 1):
            return bool(value)
        raise RefusalError(f"{name} is no boolean: expected true or false")
    if isinstance(offered, int | float):
        low, high = _LIMITS.get(name, (0, 10**6))
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if is_number and low <= value <= high and (isinstance(offered, float) or value == int(value)):
            return type(offered)(value)
        kind = "number" if isinstance(offered, float) else "whole number"
        raise RefusalError(f"{name} is out of range: expected a {kind} of {low} to {high}")
    choices = offered if isinstance(offered, list) else [offered]
    if isinstance(value, str) and value in choices:
        return value
    raise RefusalError(
        f"{name} has another value: expected one of {', '.join(str(one) for one in choices if one) or 'none'}"
    )


def _checked_points(name: str, value: Any) -> list[list[int]]:
    """Return clicks on voxels."""
    is_fit = isinstance(value, list) and len(value) <= _MOST_POINTS
    if not is_fit or not all(isinstance(point, list) and _is_voxel(point) for point in value):
        raise RefusalError(f"{name} is no list of clicks: expected at most {_MOST_POINTS} of [i, j, k], whole numbers")
    return [[int(index) for index in point] for point in value]


def _is_voxel(point: list[Any]) -> bool:
    return len(point) in (2, 3) and all(
        isinstance(index, int | float) and not isinstance(index, bool) and math.isfinite(index) and index == int(index)
        for index in point
    )


def _checked_segments(value: Any) -> list[dict[str, Any]]:
    """Return names and colours of segments, without what a DICOM SEG does not take from a request."""
    if not isinstance(value, list) or len(value) > 256 or not all(isinstance(entry, dict) for entry in value):
        raise RefusalError("label_info is no list of segments: expected [{'name': ..., 'description': ...}, ...]")
    _refuse_code(value)
    segments = [{key: entry[key] for key in _SEGMENT if entry.get(key) is not None} for entry in value]
    for segment in segments:
        for key, item in segment.items():
            is_fit = isinstance(item, _SEGMENT[key]) and len(str(item)) <= 128
            is_fit &= str(item).isprintable() if key != "color" else all(_is_colour(part) for part in item)
            if not is_fit:
                raise RefusalError(f"{key} of label_info is no {_SEGMENT[key].__name__} of at most 128 characters")
    return segments


def _is_colour(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= 255


def _refuse_code(value: Any) -> None:
    """Refuse texts that a MONAI config would evaluate."""
    if isinstance(value, str) and value.lstrip().startswith(_EVALUATED):
        raise RefusalError(f"a text begins with one of {' '.join(_EVALUATED)}: expected plain text")
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_code(key)
            _refuse_code(item)
    elif isinstance(value, list):
        for item in value:
            _refuse_code(item)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
