"""A CSV file that lists volumes with a name for each."""

from __future__ import annotations

import csv
import re
import unicodedata
from pathlib import Path

COLUMNS = ("id", "path")
RESERVED = ("function",)  # `function.html` is the page over all cases
_FILE_NAME = re.compile(r"[^\W_][\w .+=@-]*(?<![. ])")


def read_volume_list(file: Path) -> dict[str, Path]:
    """Read a list of volumes.

    Args:
        file: CSV file, UTF-8, with the columns `id` and `path`; others are ignored. Paths are relative to its folder.

    Returns:
        the path by id, in the order of the rows. The files may be missing.

    Raises:
        ValueError: if the file is no such list, or an id is no name for files. If two rows have one path or one id;
            upper and lower case count as one.
    """
    rows_of: dict[str, str] = {}  # the first row of each id and path
    volumes: dict[str, Path] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                found = ", ".join(reader.fieldnames or ()) or "nothing"
                raise ValueError(f"{file} has no column {' or '.join(missing)}: expected id,path, found {found}")
            for row in reader:
                case, text = ((row[name] or "").strip() for name in COLUMNS)
                case = unicodedata.normalize("NFC", case)
                line = f"line {reader.line_num} ({case})"
                if not text or not _FILE_NAME.fullmatch(case) or case.casefold() in RESERVED:
                    raise ValueError(
                        f"{file}, {line}: expected a path, and an id of letters, digits and . _ - + = @ that names "
                        f"files and is not {' or '.join(RESERVED)}; received {case!r} and {text!r}"
                    )
                path = file.parent / text
                for what, key in (("id", case.casefold()), ("path", str(path.resolve()))):
                    if (first := rows_of.setdefault(f"{what} {key}", line)) != line:
                        raise ValueError(
                            f"{file}: {first} and {line} have one {what}, where upper and lower case are one: the "
                            f"results could not be told apart; give each row {'an' if what == 'id' else 'a'} {what} "
                            "of its own"
                        )
                volumes[case] = path
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is no CSV file in UTF-8 ({error}): expected the columns id,path") from error
    if not volumes:
        raise ValueError(f"{file} lists no volume: expected rows below id,path")
    return volumes
