"""Pages and pictures of ventricular function: curve, contours, bull's-eye, beating heart."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from scipy.ndimage import binary_erosion

from components.base.atomic_write import write_atomically
from components.data.pictures import CLASS_COLOURS
from components.evaluation.overlays import WINDOW_PERCENTILES, Extent
from components.function.quality import SLICE_BELOW

MEASURES = {  # columns of `function.csv` on the page of a case
    "lv_edv_ml": "LV end-diastolic volume, ml",
    "lv_esv_ml": "LV end-systolic volume, ml",
    "lv_sv_ml": "LV stroke volume, ml",
    "lv_ef_percent": "LV ejection fraction, %",
    "rv_edv_ml": "RV end-diastolic volume, ml",
    "rv_esv_ml": "RV end-systolic volume, ml",
    "rv_sv_ml": "RV stroke volume, ml",
    "rv_ef_percent": "RV ejection fraction, %",
    "lv_mass_g": "LV myocardial mass at end-diastole, g",
    "heart_rate_per_min": "Heart rate, beats per minute",
    "lv_output_l_per_min": "Cardiac output, l/min",
}
IN_SUMMARY = {  # columns of `function.csv` on the page over all cases
    "lv_edv_ml": "LV EDV, ml",
    "lv_esv_ml": "LV ESV, ml",
    "lv_ef_percent": "LV EF, %",
    "rv_edv_ml": "RV EDV, ml",
    "rv_esv_ml": "RV ESV, ml",
    "rv_ef_percent": "RV EF, %",
    "lv_mass_g": "LV mass, g",
}
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:left}"
    "td.number{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}"
    ".check{background:#fdeccf}div.check{padding:.2em 1em;border-left:4px solid #d98b00}"
)
_TILES_PER_ROW = 5
_TILE_WIDTH = 200  # pixels; a row of tiles is as wide as the page
_DEFAULT_FRAME_MS = 40
_WEBP: dict[str, Any] = {"format": "WEBP", "quality": 85, "method": 0}
_DPI = 96  # of figures, that of a browser
_RINGS = ((0.72, 6), (0.44, 6), (0.16, 4))  # inner radius and segments: basal, mid, apical
_RING_WIDTH = 0.28


def draw_curve(time: Sequence[float], volumes: Mapping[str, Sequence[float]], *, unit: str, marks: Mapping) -> Figure:
    """Draw volumes over time.

    Args:
        time: time of each frame.
        volumes: volumes in ml in each frame, by class in the order of the labels.
        unit: unit of the time.
        marks: index of a frame, by the name that is written beside it.
    """
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for colour, (name, values) in zip(CLASS_COLOURS, volumes.items(), strict=False):
        axes.plot(time, values, ".-", color=colour, label=name)
    for name, index in marks.items():
        axes.axvline(time[index], color="0.6", linewidth=1, linestyle=":")
        axes.annotate(name, (time[index], 1), xycoords=("data", "axes fraction"), va="bottom", ha="center")
    axes.set(xlabel=f"time, {unit}" if unit else "frame", ylabel="volume, ml", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_bulls_eyes(values: Mapping[str, np.ndarray]) -> Figure:
    """Draw the 16 segments as rings, basal outside and apical inside, the anterior wall on top and the septum left.

    Args:
        values: values of the 16 segments, by title; nan is white.
    """
    figure = Figure(figsize=(3.6 * len(values), 3.7))
    figure.subplots_adjust(0.02, 0.02, 0.98, 0.9, wspace=0.05)  # a constrained layout takes a second drawing
    every = figure.subplots(1, len(values), subplot_kw={"projection": "polar"}, squeeze=False)[0]
    for axes, (title, of_segments) in zip(every, values.items(), strict=True):
        known = of_segments[~np.isnan(of_segments)]
        scale = Normalize(min(known.min(initial=0), 0), max(known.max(initial=0), 1e-6))
        segment = 0
        for inner, count in _RINGS:
            for number in range(count):
                value, middle = of_segments[segment], math.pi / 2 + number * 2 * math.pi / count
                colour = "white" if math.isnan(value) else colormaps["viridis"](scale(value))
                axes.bar(middle, _RING_WIDTH, 2 * math.pi / count, inner, color=colour, edgecolor="white")
                text = "-" if math.isnan(value) else f"{value:.0f}"
                dark = not math.isnan(value) and scale(value) < 0.6
                axes.text(
                    middle,
                    inner + _RING_WIDTH / 2,
                    text,
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                )
                segment += 1
        axes.set_title(title, fontsize=10, y=1, pad=4)
        axes.set_axis_off()
    return figure


def draw_frames(
    frames: Iterable[tuple[np.ndarray, np.ndarray]],
    extent: Extent,
    *,
    spacing_mm: Sequence[float],
    classes: Mapping[str, int],
) -> list[Image.Image]:
    """Draw frames: all slices side by side with their numbers, and with the outlines of the classes.

    Args:
        frames: grey values and labels `(H,W,D)` of each frame, as scanners show slices: axis 0 to the right, 1 down.
        extent: start and stop on axes 0 and 1 of the part that is shown.
        spacing_mm: voxel spacing in mm of axes 0 and 1 at least.
        classes: label of each class.

    Returns:
        pictures of equal size, all with the grey scale of the first.
    """
    (left, right), (top, bottom) = extent
    down_per_right = (bottom - top) * spacing_mm[1] / ((right - left) * spacing_mm[0])
    size = (_TILE_WIDTH, max(round(_TILE_WIDTH * down_per_right), 1))
    pictures: list[Image.Image] = []
    low, high = 0.0, 1.0
    for image, labels in frames:
        if not pictures:
            low, high = (float(value) for value in np.percentile(image, WINDOW_PERCENTILES))
        grey = ((image[left:right, top:bottom] - low) / max(high - low, 1e-6)).clip(0, 1) * 255
        cut = labels[left:right, top:bottom]
        depth = image.shape[2]
        columns = min(_TILES_PER_ROW, depth)
        picture = Image.new("RGB", (columns * size[0], math.ceil(depth / columns) * size[1]))
        draw = ImageDraw.Draw(picture)
        for n in range(depth):
            place = (n % columns * size[0], n // columns * size[1])
            picture.paste(_tile(grey[..., n], cut[..., n], size, classes), place)
            draw.text((place[0] + 4, place[1] + 2), str(n + 1), fill="white", font_size=14)
        pictures.append(picture)
    return pictures


def _tile(grey: np.ndarray, labels: np.ndarray, size: tuple[int, int], classes: Mapping[str, int]) -> Image.Image:
    """Return one slice of a size in pixels, with outlines."""
    shown = Image.fromarray(grey.T.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    tile = np.repeat(np.asarray(shown)[..., None], 3, axis=2)
    for number, value in enumerate(classes.values()):
        mask = np.asarray(Image.fromarray(np.equal(labels.T, value)).resize(size, Image.Resampling.NEAREST))
        tile[mask & ~binary_erosion(mask)] = [255 * part for part in to_rgb(CLASS_COLOURS[number])]
    return Image.fromarray(tile)


def save_cine(path: Path, pictures: Sequence[Image.Image], frame_seconds: float) -> None:
    """Write pictures as an endless WebP, with 40 ms each if the time between frames is unknown."""
    duration = _DEFAULT_FRAME_MS if math.isnan(frame_seconds) else max(20, round(1000 * frame_seconds))
    with write_atomically(path) as temporary:
        pictures[0].save(temporary, **_WEBP, save_all=True, append_images=pictures[1:], duration=duration, loop=0)


def _legend(classes: Iterable[str]) -> str:
    """Return the names of the classes in their colours, as HTML."""
    named = zip(CLASS_COLOURS, classes, strict=False)
    return "".join(f'<b style="color:{colour}">&#9632;</b> {html.escape(name)} ' for colour, name in named)


def write_case_page(
    path: Path,
    row: Mapping,
    *,
    slice_dice: Mapping[str, np.ndarray],
    figures: Mapping[str, Figure | Image.Image],
    classes: Iterable[str],
    cine: str | None = None,
) -> None:
    """Write the page of a case, which can be read offline.

    Args:
        path: the file.
        row: row of `function.csv`.
        slice_dice: predicted Dice of every slice (D,), by phase; nan if a slice shows no class.
        figures: figures and pictures by heading; they become part of the file.
        classes: names of the classes, in the order of their colours in the pictures.
        cine: name of the picture of the beating heart beside the file, if there is one.
    """
    measured = [(title, row[name]) for name, title in MEASURES.items() if row[name] != ""]
    told = f"ED is frame {row['ed_frame'] or '-'}, ES frame {row['es_frame'] or '-'}, by {row['ed_es_by']}."
    rows = "".join(f"<tr><td>{title}</td><td class=number>{value}</td></tr>" for title, value in measured)
    reasons = "".join(f"<li>{reason}</li>" for reason in _reasons(row))
    parts = [
        f"<div class=check><p>Check this case:</p><ul>{reasons}</ul></div>" if row["flag"] else "",
        f"<p>{html.escape(told)} Predicted Dice: {row['predicted_dice']}.</p>",
        f"<table>{rows}</table>",
        _slice_table(slice_dice),
    ]
    if cine:
        parts.append(f'<h2>Cine</h2><img src="{html.escape(cine)}" alt="all slices over time, with contours">')
    for heading, figure in figures.items():
        title, is_picture = html.escape(heading), isinstance(figure, Image.Image)
        with io.BytesIO() as file:
            _rendered(figure).save(file, **_WEBP)
            source = base64.b64encode(file.getvalue()).decode()
        key = f"<p>{_legend(classes)}</p>" if is_picture else ""
        parts.append(f'<h2>{title}</h2>{key}<img src="data:image/webp;base64,{source}" alt="{title}">')
    _write_page(path, str(row["case"]), parts)


def _rendered(figure: Figure | Image.Image) -> Image.Image:
    """Return a picture as it is, and a figure as a picture."""
    if isinstance(figure, Image.Image):
        return figure
    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _slice_table(slice_dice: Mapping[str, np.ndarray]) -> str:
    """Return a table of the predicted Dice with a column for each slice; low values are marked."""
    depth = max((len(values) for values in slice_dice.values()), default=0)
    lines = ["<tr><th>slice</th>" + "".join(f"<th>{number}</th>" for number in range(1, depth + 1)) + "</tr>"]
    for phase, values in slice_dice.items():
        cells = (
            "<td>-</td>" if math.isnan(value) else f"<td{_marked(value < SLICE_BELOW)}>{value:.2f}</td>"
            for value in values.tolist()
        )
        lines.append(f"<tr><td>{phase}</td>{''.join(cells)}</tr>")
    return f"<h2>Predicted Dice of each slice</h2><table>{''.join(lines)}</table>"


def _reasons(row: Mapping) -> list[str]:
    return [html.escape(reason) for reason in str(row["reason"]).split("; ") if reason]


def _marked(is_marked: bool) -> str:
    return " class=check" if is_marked else ""


def write_summary_page(path: Path, rows: Sequence[Mapping], pages: Mapping[str, str]) -> None:
    """Write the page over all cases, flagged ones first.

    Args:
        path: the file.
        rows: rows of `function.csv`.
        pages: file name of each case's page, beside this one.
    """
    titles = ("case", *IN_SUMMARY.values(), "predicted Dice", "why to check it")
    head = "".join(f"<th>{title}</th>" for title in titles)
    lines = []
    for row in sorted(rows, key=lambda row: not row["flag"]):
        case = html.escape(str(row["case"]))
        cells = "".join(f"<td class=number>{row[name] or '-'}</td>" for name in (*IN_SUMMARY, "predicted_dice"))
        cells += f"<td>{'<br>'.join(_reasons(row))}</td>"
        link = f'<a href="{html.escape(pages[str(row["case"])])}">{case}</a>'
        lines.append(f"<tr{_marked(bool(row['flag']))}><td>{link}</td>{cells}</tr>")
    flagged = f"<p>{sum(bool(row['flag']) for row in rows)} of {len(rows)} cases to check, listed first.</p>"
    _write_page(path, "Ventricular function", [flagged, f"<table><tr>{head}</tr>{''.join(lines)}</table>"])


def _write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    text = html.escape(title)
    note = "<p>Research only; not for clinical use. What is not marked may be wrong all the same: look at it.</p>"
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{text}</title><style>{_STYLE}</style>'
    with write_atomically(path) as temporary:
        temporary.write_text(f"{page}<h1>{text}</h1>{note}{''.join(parts)}</html>\n", encoding="utf-8")
