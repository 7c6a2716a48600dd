"""Write the bundles from `autosam_acdc` and from what `bundles.json` says of each, or check that they are up to date.

A change that concerns all bundles is made in `autosam_acdc`, one that concerns a single bundle in `bundles.json`, the
meaning of a knob in `knobs.json`; then `python bundles/derive.py` writes the bundles' files, brings every config into
the same layout, and fills the tables of knobs. `python bundles/derive.py --check` writes nothing and fails when a file
is not what it would write.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

BUNDLES = Path(__file__).parent
SOURCE = "autosam_acdc"
FILES = ("LICENSE", "large_files.yml", "configs/*.json", "configs/logging.conf", "docs/*")
ONLY_IN_SOURCE = ("configs/demo.json",)
WIDTH, LIST_ITEM_WIDTH = 120, 250  # columns: a transform or handler of a list stands on one line

Config = dict[str, Any]


def read_entries(folder: Path = BUNDLES) -> dict[str, Any]:
    """Read `bundles.json`: the entries of `heads`, `baselines` and `others`, each by bundle."""
    return json.loads((folder / "bundles.json").read_text())


def as_text(config: Mapping[str, Any], spaced: Iterable[str] = ()) -> str:
    """Lay a config out: a value that fits stands on one line.

    Args:
        config: parsed JSON.
        spaced: top-level keys that a blank line precedes.

    Returns:
        the text of the file.
    """
    entries = [("\n" if key in spaced else "") + f"    {json.dumps(key)}: {_value(config[key], 1)}" for key in config]
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _value(value: Any, depth: int, *, in_list: bool = False) -> str:
    flat = json.dumps(value, ensure_ascii=False)
    width = LIST_ITEM_WIDTH if in_list and isinstance(value, dict) and "{" not in flat[1:] else WIDTH
    if not isinstance(value, dict | list) or not value or 4 * depth + len(flat) <= width:
        return flat
    indent = "\n" + 4 * (depth + 1) * " "
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_value(item, depth + 1)}" for key, item in value.items()]
    else:
        items = [_value(item, depth + 1, in_list=True) for item in value]
    start, end = ("{", "}") if isinstance(value, dict) else ("[", "]")
    return start + indent + f",{indent}".join(items) + "\n" + 4 * depth * " " + end


def edited(
    text: str,
    *,
    remove: Iterable[str] = (),
    add: Mapping[str, Config] | None = None,
    replace: Mapping[str, Any] | None = None,
) -> str:
    """Edit the text of a config.

    Args:
        text: of a JSON object.
        remove: ids, their parts separated by `#` as in MONAI; an item of a list is named by the last word of its
            `_target_`.
        add: new keys with their values, by the id before which they stand.
        replace: new values by id.

    Returns:
        the text in this module's layout; blank lines stay where they were.

    Raises:
        KeyError: for an id or key that the config lacks.
    """
    config, spaced = json.loads(text), set(re.findall(r'\n\n    "(\w[\w#]*)":', text))
    for name, new in (add or {}).items():
        if not new:
            continue
        parent, key = _find(config, name)
        items = list(parent.items())
        place = [item[0] for item in items].index(key)
        parent.clear()
        parent.update([*items[:place], *new.items(), *items[place:]])
        if parent is config and key in spaced:
            spaced = spaced - {key} | {next(iter(new))}
    for name in remove:
        parent, key = _find(config, name)
        if parent is config and key in spaced:  # the blank line before a group stays
            following = list(config).index(key) + 1
            spaced |= set(list(config)[following : following + 1])
        del parent[key]
    for name, value in (replace or {}).items():
        parent, key = _find(config, name)
        parent[key] = value
    return as_text(config, spaced)


def _find(config: Config, name: str) -> tuple[Any, Any]:
    """Return the dictionary or list that holds what an id names, and its key or index there."""
    value: Any = config
    parts = name.split("#")
    while parts:
        parent, taken = value, 1
        if isinstance(parent, list):
            targets = [item["_target_"].split(".")[-1] for item in parent]
            key: Any = targets.index(parts[0]) if parts[0] in targets else None
        else:  # a key of an overlay is an id itself
            prefixes = {"#".join(parts[:count]): count for count in range(1, len(parts) + 1)}
            key = next((prefix for prefix in prefixes if prefix in parent), None)
            taken = prefixes.get(key, 1)
        if key is None:
            raise KeyError(f"no {name!r} in the config: {parts[0]!r} is missing")
        value, parts = parent[key], parts[taken:]
    return parent, key


def own_tiny_knobs(head: Config) -> Config:
    """Return those knobs that the tiny overlay sets which only this head has, such as the CNN head's `depth`."""
    return {
        name: value for name, value in head.get("tiny", {}).get("knobs", {}).items() if name in head.get("knobs", {})
    }


def head_edits(head: Config) -> dict[str, Config]:
    """Return how the configs of a head's bundle differ from the source's, as arguments of `edited` by config."""
    own = head.get("knobs", {})
    recorded = {name: f"@{name}" for name in own}
    resolved = {value: f"$@as_trained['{value[1:]}']" for value in ("@out_channels", *recorded.values())}
    as_trained = {key: resolved.get(str(value), value) for key, value in head["head"].items()}
    tiny = head.get("tiny", {})
    pretrained = None
    if "pretrained" in tiny:
        pretrained = {"_target_": "components.pretrained.pretrained_file", "name": tiny["pretrained"]}
    knobs = own_tiny_knobs(head)
    others = {name: value for name, value in tiny.get("knobs", {}).items() if name not in knobs}
    description = f"SAM's image encoder, frozen, under {head['description']}, trained on 1 or 5 labelled ACDC patients"
    return {
        "train": {
            "add": {"precision": own, "trained_with#canvas_size": recorded},
            "replace": {"network_def#head": head["head"]},
        },
        "inference": {
            "add": {
                "precision": dict.fromkeys(own),
                "as_trained#given#canvas_size": recorded,
                "as_trained#otherwise#canvas_size": own,
            },
            "replace": {"network_def#head": as_trained},
        },
        "tiny": {"add": {"epochs": knobs}, "replace": {"head_checkpoint": pretrained, **others}},
        "metadata": {"replace": {"name": head["name"], "description": description}},
    }


def with_part(text: str, name: str, part: str) -> str:
    """Fill what stands between the lines `<!-- name -->` and `<!-- end of name -->` of a Markdown text."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
    changed, count = re.subn(pattern, lambda match: f"{match[1]}{part}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one part <!-- {name} --> ... <!-- end of {name} -->, found {count}")
    return changed


def _default(knob: str, configs: Iterable[Config], computed: Sequence[str]) -> str:
    """Return a knob's default in the first config to have it as Markdown, or the text for one that is computed."""
    value = next(config[knob] for config in configs if knob in config)
    return computed[0] if computed else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def readme_table(config: Config, config_name: str, meanings: Mapping[str, list[str]]) -> str:
    """Return the table of knobs of a bundle's README, in the order of `knobs.json`."""
    rows = [
        f"| `{knob}` | {_default(knob, [config], computed)} | {meaning} |"
        for knob, (meaning, *computed) in meanings.items()
        if knob in config
    ]
    return "\n".join([f"| knob of `{config_name}.json` | default | meaning |", "|---|---|---|", *rows])


def knobs_page_table(configs: Mapping[str, Mapping[str, Config]], meanings: Mapping[str, list[str]]) -> str:
    """Return the table of docs/knobs.md: each knob with its configs, and the bundles with another default.

    Args:
        configs: by bundle and name of the config.
        meanings: `knobs.json`.
    """
    rows = []
    for knob, (meaning, *computed) in meanings.items():
        having = {bundle: {name for name in each if knob in each[name]} for bundle, each in configs.items()}
        having = {bundle: names for bundle, names in having.items() if names}
        default, *others = (_default(knob, configs[bundle].values(), computed) for bundle in having)
        differing = zip(list(having)[1:], others, strict=True)
        default += "".join(f", {other} in `{bundle}`" for bundle, other in differing if other != default)
        only = f" of `{next(iter(having))}`" if len(having) == 1 else ""
        places = set().union(*having.values())
        place = "both" if {"train", "inference"} <= places else f"`{max(places)}.json`"
        rows.append(f"| `{knob}` | {default} | {place}{only} | {meaning} |")
    return "\n".join(["| knob | default | in | meaning |", "|---|---|---|---|", *rows])


def expected_files(folder: Path = BUNDLES) -> dict[Path, str]:
    """Return the text that every file that is derived or laid out by this program should have.

    Args:
        folder: of the bundles, `bundles.json` and `knobs.json`.
    """
    entries, meanings = read_entries(folder), json.loads((folder / "knobs.json").read_text())
    del meanings["_desc_"]
    source = {path.relative_to(folder / SOURCE).as_posix(): path.read_text() for path in _files(folder / SOURCE)}
    files: dict[Path, str] = {}
    for bundle, entry in (entries["heads"] | entries["baselines"]).items():
        edits = head_edits(entry) if bundle in entries["heads"] else entry
        left_out = (*entry.get("leaves_out", ()), *entry.get("has_its_own", ()))
        if bundle != SOURCE:
            left_out += ONLY_IN_SOURCE
        for name, text in source.items():
            if name in left_out:
                continue
            if name.endswith(".json"):
                text = edited(text, **_with_values(edits.get(Path(name).stem, {}), source))
            elif name == "docs/README.md":
                _, _, rest = text.partition("\n")
                text = f"# {entry['name']}\n" + with_part(rest, "head", "\n".join(entry["about"]))
            files[folder / bundle / name] = text.replace(SOURCE, bundle)
    for path in sorted(folder.glob("*/configs/*.json")):
        if path not in files:
            files[path] = edited(path.read_text())
    configs: dict[str, dict[str, Config]] = {}
    for bundle in (*entries["heads"], *entries["baselines"], "sambox_acdc"):
        of_bundle = {
            name: folder / bundle / f"configs/{name}.json"
            for name in ("train", "inference", "evaluate", "function", "small")
        }
        configs[bundle] = {name: json.loads(files[path]) for name, path in of_bundle.items() if path in files}
        name = next(iter(configs[bundle]))
        readme = folder / bundle / "docs/README.md"
        table = readme_table(configs[bundle][name], name, meanings)
        files[readme] = with_part(files.get(readme) or readme.read_text(), "knobs", table)
    files |= _template_files(entries["templates"], folder, files, meanings)
    page = folder.parent / "docs/knobs.md"
    files[page] = with_part(page.read_text(), "knobs", knobs_page_table(configs, meanings))
    return files


def _with_values(edits: Config, source: Mapping[str, str]) -> Config:
    """Return the arguments of `edited`: `replace_as_in` names configs of the source and the ids to take from them."""
    others = {key: value for key, value in edits.items() if key != "replace_as_in"}
    for config, names in edits.get("replace_as_in", {}).items():
        values = json.loads(source[config])
        others["replace"] = others.get("replace", {}) | {name: values[name] for name in names}
    return others


def _template_files(
    templates: Config, folder: Path, files: Mapping[Path, str], meanings: Mapping[str, list[str]]
) -> dict[Path, str]:
    """Return the files of the templates from which programs make bundles: edited like those of the bundles."""
    made = {}
    for place, entry in templates.items():
        source, template = folder / entry["from"], folder.parent / place
        left_out = (*entry["leaves_out"], *entry["has_its_own"])
        for path, text in files.items():
            name = path.relative_to(source).as_posix() if path.is_relative_to(source) else ""
            if name and name not in left_out:
                is_config = name.endswith(".json")
                made[template / name] = edited(text, **entry.get(Path(name).stem, {})) if is_config else text
        readme = template / "docs/README.md"
        table = readme_table(json.loads(made[template / "configs/train.json"]), "train", meanings | entry["knobs"])
        made[readme] = with_part(readme.read_text(), "knobs", table)
    return made


def differing_files(folder: Path = BUNDLES) -> list[Path]:
    """Return the files that are missing, extra or other than expected."""
    expected, entries = expected_files(folder), read_entries(folder)
    extra = [
        path
        for bundle, entry in (entries["heads"] | entries["baselines"]).items()
        for path in _files(folder / bundle)
        if path not in expected and path.relative_to(folder / bundle).as_posix() not in entry.get("has_its_own", ())
    ]
    return extra + [path for path, text in expected.items() if not path.is_file() or path.read_text() != text]


def _files(bundle: Path) -> list[Path]:
    """Return the files that make up a bundle; what else lies in its folder was made by running it."""
    return sorted(path for pattern in FILES for path in bundle.glob(pattern))


def main() -> None:
    """Write the bundles, or with `--check` report what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail when a file would change")
    if parser.parse_args().check:
        if differing := differing_files():
            sys.exit(f"not as derived, run `python bundles/derive.py`: {', '.join(map(str, differing))}")
        return
    for path, text in expected_files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
