"""The template of all bundles: JSON and Markdown with places, which the parts of a network and of its data fill.

In a config, `"...name"` is the place of the part `name`: as a key it is replaced by the part's entries, in a list by
its items, elsewhere by the part itself. Within text, `{{name}}` is the place of a part that is text or lines of text.
What is for some bundles alone says so by their tags: a config under `_only_for_`, Markdown between comments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import components
from components.sam.checkpoint import CHECKPOINT_FILES
from components.sam.defaults import PHANTOM_UNET as SHIPPED_ENCODER

FOLDER = Path(__file__).parent / "template"
WIDTH, LIST_ITEM_WIDTH = 120, 250  # columns: a transform or handler of a list stands on one line
_PLACE, _ONLY_FOR = "...", "_only_for_"
_NAME = re.compile(r"\{\{(\w+)\}\}")
_ONLY_FOR_BLOCK = re.compile(r"<!-- only for ([\w ]+) -->\n(.*?)<!-- end -->\n", re.DOTALL)
_TOP_LEVEL_AFTER_BLANK_LINE = re.compile(r'\n\n    "([\w#.]+)":')
_PARTS = ("networks.json", "datasets.json", "knobs.json")
_FILES_ONLY_FOR = {"docs/data_license.txt": "acdc", "large_files.yml": "encoder published"}

Parts = dict[str, Any]


def networks() -> dict[str, Parts]:
    """Return what `networks.json` says of each network, by name."""
    return _read("networks.json")["networks"]


def encoders() -> dict[str, dict[str, str]]:
    """Return file name, address and SHA-256 of each published encoder, by model type."""
    facts = _read("networks.json")["encoders"]
    return {name: {"file": file, **facts[name]} for name, file in CHECKPOINT_FILES.items()}


def knob_meanings() -> dict[str, list[str]]:
    """Return what each knob means, and a text for a default that is computed, by knob."""
    meanings = _read("knobs.json")
    del meanings["_desc_"]
    return meanings


class Instance:
    """A bundle of the template.

    Args:
        network: name of a network.
        cases: `acdc` for a folder of ACDC's layout, `custom` for cases that `data.json` lists.
        hearts: whether the classes are RV, Myo and LV, of which there are phantoms and pretrained weights.
        model_type: the encoder; any but the shipped one makes the paper's recipe, `sam.json`, the bundle's own.
        sam_checkpoint: path of that encoder's file, None for where `download_large_files` puts SAM's own.
        texts: further parts for documents and metadata.

    Raises:
        ValueError: for an unknown network, or an encoder for one that has none.
    """

    def __init__(
        self,
        network: str,
        *,
        cases: str,
        hearts: bool,
        model_type: str = SHIPPED_ENCODER,
        sam_checkpoint: str | None = None,
        texts: Mapping[str, Any] | None = None,
    ) -> None:
        described, datasets = _read("networks.json"), _read("datasets.json")
        known = described["networks"]
        if network not in known:
            raise ValueError(f"unknown network {network!r}: expected one of {', '.join(known)}")
        own, published = known[network], encoders()
        kind, shows = own["kind"], "hearts" if hearts else "any"
        self.is_of_paper = model_type != SHIPPED_ENCODER or sam_checkpoint is not None
        if kind != "encoder" and self.is_of_paper:
            with_encoder = [name for name, entry in known.items() if entry["kind"] == "encoder"]
            raise ValueError(f"{network} has no encoder for {model_type}: expected one of {', '.join(with_encoder)}")
        if sam_checkpoint is None and model_type not in (types := (SHIPPED_ENCODER, *published)):
            raise ValueError(
                f"no published encoder has model_type {model_type!r}: expected one of {', '.join(types)}, or the "
                "encoder's file; give --sam_checkpoint FILE"
            )
        self.tags = {kind, network, cases, shows} | ({"pretrained"} & own.keys())
        layers = [datasets[shows], datasets[cases], of_kind := described["kinds"][kind], of_kind[shows]]
        self.parts: Parts = {}
        for layer in (*layers, own, own.get(shows, {}), _of_head(own), texts or {}):
            self.parts |= layer
        side = 176 if hearts and not self.is_of_paper else 256
        self.parts |= {"package_version": components.__version__, "side": str(side), "spatial_shape": [side, side]}
        if self.is_of_paper:
            self.parts["encoder_about"] = f"SAM's image encoder ({model_type})"
        self.tags.add("paper" if self.is_of_paper else "shipped")
        self.model = {"model_type": model_type} | ({"sam_checkpoint": sam_checkpoint} if sam_checkpoint else {})
        if sam_checkpoint is None:
            facts = published[model_type if self.is_of_paper else "vit_b"]
            self.parts |= {f"sam_{name}": value for name, value in facts.items()}
            self.tags.add("published")

    def files(self) -> dict[str, str]:
        """Return the texts of all files of the bundle by path, `configs/data.json` of one's own data apart."""
        files = {}
        for path in sorted(FOLDER.rglob("*")):
            name = path.relative_to(FOLDER).as_posix()
            if path.is_dir() or name in _PARTS or not self._has(_FILES_ONLY_FOR.get(name, "")):
                continue
            text = self._filled(path.read_text(), is_config=path.suffix == ".json")
            if text is not None:
                files[name] = text
        if self.is_of_paper:
            self._make_the_papers(files)
        knobs = readme_table(json.loads(files["configs/train.json"]), "train", self._meanings())
        files["docs/README.md"] = files["docs/README.md"].replace("<!-- knobs -->", knobs)
        return files

    def write(self, folder: Path) -> None:
        """Write the bundle's files into a folder, which is made if missing; what else is there stays."""
        for name, text in self.files().items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def _filled(self, text: str, *, is_config: bool) -> str | None:
        """Return the text of a file with its places filled; None for one that is for other bundles."""
        if not is_config:
            return self._text(_ONLY_FOR_BLOCK.sub(lambda match: match[2] if self._has(match[1]) else "", text))
        template = json.loads(text)
        if not self.tags.issuperset(template.pop(_ONLY_FOR, ())):
            return None
        spaced = set()
        for key in _TOP_LEVEL_AFTER_BLANK_LINE.findall(text):  # of a place that is empty the next entry's
            keys = list(template)[list(template).index(key) :]
            spaced.update([next(name for each in keys for name in self._config({each: template[each]}))])
        return as_text(self._config(template), spaced)

    def _has(self, tags: str) -> bool:
        return self.tags.issuperset(tags.split())

    def _config(self, value: Any) -> Any:
        """Return a part of a config with its places filled."""
        if isinstance(value, str) and value.startswith(_PLACE):
            return self._config(self.parts[value.removeprefix(_PLACE)])
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list):
            filled: list[Any] = []
            for item in value:
                part = self._config(item)
                is_spread = isinstance(item, str) and item.startswith(_PLACE) and isinstance(part, list)
                filled += part if is_spread else [part]
            return filled
        if isinstance(value, dict):
            config: Parts = {}
            for key, item in value.items():
                config |= self._config(key) if key.startswith(_PLACE) else {key: self._config(item)}
            return config
        return value

    def _text(self, text: str) -> str:
        def part(match: re.Match[str]) -> str:
            value = self.parts[match[1]]
            return self._text(value if isinstance(value, str) else "\n".join(value))

        return _NAME.sub(part, text)

    def _make_the_papers(self, files: dict[str, str]) -> None:
        """Put the overlay of the paper's recipe into the configs, and the encoder's name."""
        recipe = json.loads(files.pop("configs/sam.json")) | self.model
        del recipe["_desc_"]
        for name, knobs in (("train", recipe), ("inference", self.model | {"start_checkpoint": None})):
            path = f"configs/{name}.json"
            files[path] = with_values(files[path], knobs)

    def _meanings(self) -> dict[str, list[str]]:
        return knob_meanings() | self.parts.get("meanings", {})


def _of_head(network: Parts) -> Parts:
    """Return the parts that follow from a head's own: its knobs as a training records them, and as inference reads."""
    if "head" not in network:
        return {}
    knobs = network.get("head_knobs", {})
    settings = {f"@{name}": f"$@settings['{name}']" for name in ("out_channels", *knobs)}
    return {
        "head_knobs_as_trained": dict.fromkeys(knobs),
        "head_recorded": {name: f"@{name}" for name in knobs},
        "head_recorded_as_trained": {name: settings[f"@{name}"] for name in knobs},
        "head_as_trained": {key: settings.get(str(value), value) for key, value in network["head"].items()},
    }


def _read(name: str) -> Parts:
    return json.loads((FOLDER / name).read_text())


def with_values(text: str, values: Mapping[str, Any]) -> str:
    """Return the text of a config with other values of top-level keys; its blank lines stay."""
    return as_text(json.loads(text) | dict(values), _TOP_LEVEL_AFTER_BLANK_LINE.findall(text))


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


def readme_table(config: Parts, config_name: str, meanings: Mapping[str, list[str]]) -> str:
    """Return the table of the knobs that a config has, in the order of `knobs.json`."""
    rows = [
        f"| `{knob}` | {_default(config[knob], computed)} | {meaning} |"
        for knob, (meaning, *computed) in meanings.items()
        if knob in config
    ]
    return "\n".join([f"| knob of `{config_name}.json` | default | meaning |", "|---|---|---|", *rows])


def _default(value: Any, computed: list[str]) -> str:
    is_given = isinstance(value, bool | int | float) or (isinstance(value, str) and value[:1] not in ("", "$", "@"))
    if computed and not is_given:
        return computed[0]
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def knobs_page(page: str, folders: Mapping[str, Path], texts: Mapping[Path, str]) -> str:
    """Return docs/knobs.md with its table: each knob with its configs, and the bundles with another default.

    Args:
        page: its text, with the table between the comments `knobs` and `end of knobs`.
        folders: of configs, by bundle.
        texts: of configs by path; others are read.
    """
    configs: dict[str, dict[str, Parts]] = {}
    for bundle, folder in folders.items():
        paths = {name: folder / f"{name}.json" for name in ("train", "inference", "evaluate", "function")}
        found = {
            name: texts.get(path) or path.read_text() for name, path in paths.items() if path in texts or path.is_file()
        }
        configs[bundle] = {name: json.loads(text) for name, text in found.items()}
    rows = []
    for knob, (meaning, *computed) in knob_meanings().items():
        having = {bundle: [name for name in each if knob in each[name]] for bundle, each in configs.items()}
        having = {bundle: names for bundle, names in having.items() if names}
        if not having:  # of one's own data alone
            continue
        values = {bundle: _default(configs[bundle][names[0]][knob], computed) for bundle, names in having.items()}
        default = next(iter(values.values()))
        default += "".join(f", {value} in `{bundle}`" for bundle, value in values.items() if value != default)
        only = f" of `{next(iter(having))}`" if len(having) == 1 else ""
        places = {name for names in having.values() for name in names}
        place = "both" if {"train", "inference"} <= places else f"`{max(places)}.json`"
        rows.append(f"| `{knob}` | {default} | {place}{only} | {meaning} |")
    table = "\n".join(["| knob | default | in | meaning |", "|---|---|---|---|", *rows])
    before, _, rest = page.partition("<!-- knobs -->\n")
    _, _, after = rest.partition("<!-- end of knobs -->")
    return f"{before}<!-- knobs -->\n{table}\n<!-- end of knobs -->{after}"
