"""The template of all bundles: JSON and Markdown files with placeholders for parts of a network and its data.

In a config, `"...name"` is the placeholder of the part `name`. As a key it is replaced by the part's entries, in a list
by its items, elsewhere by the part itself. In text, `{{name}}` is the placeholder of a text or of lines of text.
Parts for some bundles only have tags: `_only_for_` in a config, comments in Markdown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import components
from components.sam.encoders import ENCODERS, GENERAL_UNET, SHIPPED, page_of, published_encoders
from components.sam.encoders import PHANTOM_UNET as SHIPPED_ENCODER

FOLDER = Path(__file__).parent / "template"
WIDTH, LIST_ITEM_WIDTH = 120, 250  # columns; a transform or handler in a list is kept on one line
_PLACE, _ONLY_FOR = "...", "_only_for_"
_NAME = re.compile(r"\{\{(\w+)\}\}")
_ONLY_FOR_BLOCK = re.compile(r"<!-- only for ([\w ]+) -->\n(.*?)<!-- end -->\n", re.DOTALL)
_TOP_LEVEL_AFTER_BLANK_LINE = re.compile(r'\n\n    "([\w#.]+)":')
_PARTS = ("networks.json", "datasets.json", "knobs.json")
_FILES_ONLY_FOR = {"docs/data_license.txt": "acdc", "large_files.yml": "encoder published"}
KNOBS_LINK = "The page of [knobs](../../../docs/knobs.md) explains all options."  # in the READMEs of the ACDC bundles

Parts = dict[str, Any]


def networks() -> dict[str, Parts]:
    """Return the entry of each network in `networks.json`, by name."""
    return _read("networks.json")["networks"]


def needs_sam_decoder(network: Mapping[str, Any]) -> bool:
    """Return whether the head of an entry of `networks` starts from SAM's mask decoder."""
    return "checkpoint" in network.get("head", {})


def encoders() -> dict[str, dict[str, str]]:
    """Return file name, address and SHA-256 of each published encoder, by model type."""
    return {
        name: {"file": str(entry.file), "url": entry.url, "sha256": entry.sha256}
        for name, entry in published_encoders().items()
    }


def knob_meanings() -> dict[str, list[str]]:
    """Return each knob's meaning, followed by a text for its default if that is computed, by knob."""
    meanings = _read("knobs.json")
    del meanings["_desc_"]
    return meanings


class Instance:
    """A bundle made from the template.

    Args:
        network: name of a network.
        cases: `acdc` for a folder in ACDC's layout, `custom` for the cases in `data.json`.
        hearts: whether the classes are RV, Myo and LV, for which phantoms and pretrained weights exist.
        model_type: the encoder; any that does not ship makes the paper's recipe, `sam.json`, the bundle's default.
        sam_checkpoint: path of the encoder's file; None for the path at which `download_large_files` stores SAM's.
        texts: further parts for documents and metadata.

    Raises:
        ValueError: if the network or encoder is unknown, the network has no encoder, or they do not fit.
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
        self.is_of_paper = model_type not in SHIPPED or sam_checkpoint is not None
        is_general = model_type == GENERAL_UNET and not self.is_of_paper
        if kind != "encoder" and (self.is_of_paper or is_general):
            with_encoder = [name for name, entry in known.items() if entry["kind"] == "encoder"]
            raise ValueError(f"{network} has no encoder for {model_type}: expected one of {', '.join(with_encoder)}")
        has_decoder = model_type not in ENCODERS or ENCODERS[model_type].has_sam_decoder
        if needs_sam_decoder(own) and not has_decoder:
            *others, last = (name for name, each in known.items() if "head" in each and not needs_sam_decoder(each))
            raise ValueError(
                f"{network} starts from SAM's mask decoder, which {model_type} lacks: use {', '.join(others)} or {last}"
            )
        if sam_checkpoint is None and model_type not in (types := (*SHIPPED, *published)):
            page = page_of(model_type)
            raise ValueError(
                f"the file of {model_type} is not downloaded for you: get it from {page}, and give --checkpoint FILE"
                if page
                else f"no published encoder has model_type {model_type!r}: expected one of {', '.join(types)}, or the "
                "encoder's file; give --checkpoint FILE"
            )
        self.tags = {kind, network, cases, shows} | ({"pretrained"} & own.keys())
        of_kind = described["kinds"][kind]
        layers = [*(datasets[name] for name in ("all", shows, cases)), of_kind, of_kind[shows]]
        if is_general:
            layers.append(described["kinds"]["general"])
        self.parts: Parts = {"shipped_encoder": SHIPPED_ENCODER if self.is_of_paper else model_type}
        of_general = own.get("general", {}) if is_general else {}
        for layer in (*layers, own, own.get(shows, {}), of_general, _of_head(own), texts or {}):
            self.parts |= layer
        metrics = own.get("eval_metrics", {}) if cases == "acdc" and not self.is_of_paper else {}
        self.parts |= {"eval_metrics": metrics, **{name: f"{value:.3f}" for name, value in metrics.items()}}
        self.tags |= metrics.keys()
        largest = 256 if self.is_of_paper else self.parts.get("largest_patch", 256)
        side = 176 if hearts and not self.is_of_paper else largest
        self.parts |= {"package_version": components.__version__, "side": str(side), "spatial_shape": [side, side]}
        self.parts["encoder_copyright"] = ""
        if self.is_of_paper and (encoder := ENCODERS.get(model_type)):
            self.parts |= {
                "encoder_about": f"{encoder.family}'s image encoder ({model_type})",
                "encoder_copyright": f"; the encoder's weights: {encoder.licence}",
                "encoder_licence": f"The encoder's weights: {encoder.licence}. {encoder.terms}".rstrip(),
            }
        self.tags.add("paper" if self.is_of_paper else "general" if is_general else "shipped")
        self.model = {"model_type": model_type} | ({"sam_checkpoint": sam_checkpoint} if sam_checkpoint else {})
        if sam_checkpoint is None:
            facts = published[model_type if self.is_of_paper else "vit_b"]
            self.parts |= {f"sam_{name}": value for name, value in facts.items()}
            self.tags.add("published")

    def files(self) -> dict[str, str]:
        """Return the text of every file of the bundle except `configs/data.json`, by path."""
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
        table = readme_table(json.loads(files["configs/train.json"]), "train", self._meanings())
        knobs = KNOBS_LINK if self._has("acdc") else table  # `release` puts the table into archives
        files["docs/README.md"] = files["docs/README.md"].replace("<!-- knobs -->", knobs)
        return files

    def write(self, folder: Path) -> None:
        """Write the bundle's files into a folder, which is created if missing; other files in it are kept."""
        for name, text in self.files().items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def _filled(self, text: str, *, is_config: bool) -> str | None:
        """Return the text of a file with its placeholders filled; None for a file of other bundles."""
        if not is_config:
            return self._text(_ONLY_FOR_BLOCK.sub(lambda match: match[2] if self._has(match[1]) else "", text))
        template = json.loads(text)
        if not self.tags.issuperset(template.pop(_ONLY_FOR, ())):
            return None
        spaced = set()
        for key in _TOP_LEVEL_AFTER_BLANK_LINE.findall(text):  # an empty placeholder passes its line to the next entry
            keys = list(template)[list(template).index(key) :]
            spaced.update([next(name for each in keys for name in self._config({each: template[each]}))])
        return as_text(self._config(template), spaced)

    def _has(self, tags: str) -> bool:
        return self.tags.issuperset(tags.split())

    def _config(self, value: Any) -> Any:
        """Return a part of a config with its placeholders filled."""
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
        """Merge the overlay of the paper's recipe into the configs, and set the encoder."""
        recipe = json.loads(files.pop("configs/sam.json")) | self.model
        del recipe["_desc_"]
        for name, knobs in (("train", recipe), ("inference", self.model | {"start_checkpoint": None})):
            path = f"configs/{name}.json"
            files[path] = with_values(files[path], knobs)

    def _meanings(self) -> dict[str, list[str]]:
        return knob_meanings() | self.parts.get("meanings", {})


def _of_head(network: Parts) -> Parts:
    """Return the parts derived from a head: its knobs as training records them and as inference reads them."""
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
    """Return the text of a config with new values of top-level keys; blank lines are kept."""
    return as_text(json.loads(text) | dict(values), _TOP_LEVEL_AFTER_BLANK_LINE.findall(text))


def as_text(config: Mapping[str, Any], spaced: Iterable[str] = ()) -> str:
    """Format a config, with every value that fits on one line.

    Args:
        config: parsed JSON.
        spaced: top-level keys that follow a blank line.

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
    """Return `docs/knobs.md` with a new table: each knob, its configs, and the bundles with another default.

    Args:
        page: text of the page, with the table between the comments `knobs` and `end of knobs`.
        folders: folder of configs, by bundle.
        texts: texts of configs, by path; others are read from disk.
    """
    configs: dict[str, dict[str, Parts]] = {}
    for bundle, folder in folders.items():
        paths = {name: folder / f"{name}.json" for name in ("train", "inference", "evaluate", "function", "correct")}
        found = {
            name: texts.get(path) or path.read_text() for name, path in paths.items() if path in texts or path.is_file()
        }
        configs[bundle] = {name: json.loads(text) for name, text in found.items()}
    rows = []
    for knob, (meaning, *computed) in knob_meanings().items():
        having = {bundle: [name for name in each if knob in each[name]] for bundle, each in configs.items()}
        having = {bundle: names for bundle, names in having.items() if names}
        if not having:  # only in bundles for a user's own data
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
