"""t-SNE of the encoder's embeddings of test slices and, for hearts, of phantoms: the paper's figure 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from components.base.volume_metadata import case_name_of
from components.phantom.slices import FIELD_MM, phantom_slices
from study.data import ACDC, StudyData
from study.grid import Cell
from study.report.figures import COLOURS
from study.report.scores import evaluation_parser

PHANTOMS = "phantoms"
_OTHERS = "others"
_PHANTOM_COUNT = 60
_PHANTOM_SEED = 0
_BATCH_SIZE = 4
_MOST_GROUPS = 12
_FEWEST = 7  # vectors; each then has two neighbours for t-SNE
_SEED = 0
_LARGEST_PERPLEXITY = 30
_MARKERS = ("o", "^")
_NEUTRAL = "0.6"


def embedding_cell(cells: Iterable[Cell]) -> Cell | None:
    """Return the first cell whose method trains a head on a frozen encoder, None if there is none.

    Args:
        cells: cells in the study's order; those of ablations are skipped.
    """
    for cell in cells:
        if cell.variant is None and cell.method.trains and _is_frozen(cell):
            return cell
    return None


def embed_slices(
    cell: Cell, output_dir: Path, *, dataset_dir: str, data: StudyData = ACDC, sam_dir: str | None = None
) -> tuple[np.ndarray, list[str]]:
    """Encode all slices of a cell's test cases, and for ACDC also phantoms, with its frozen encoder.

    Slices are preprocessed as in the cell's config and its trained model. The encoder computes in fp32.

    Args:
        cell: a finished cell with a frozen encoder.
        output_dir: folder of the study, whose embedding cache is used.
        dataset_dir: as for `study.cells.list_stages`.
        data: data of the study.
        sam_dir: folder of SAM's checkpoints; None for the bundle's own `models`.

    Returns:
        embeddings averaged over space, (N, 256) float32, and their groups. A group is a patient, a group of a user's
        own cases, or `PHANTOMS`.
    """
    parser = evaluation_parser(cell, dataset_dir=dataset_dir, output_dir=output_dir, sam_dir=sam_dir)
    network = parser.get_parsed_content("network").eval()
    vectors, groups, side = [], [], 0
    for case in parser.get_parsed_content("validate#dataloader#dataset"):
        images = case["image"].as_tensor().permute(3, 0, 1, 2)
        vectors.append(_mean_embeddings(network.encoder, images))
        groups += [data.group_of(case_name_of(case["image"]))] * len(images)
        side = images.shape[-1]
    if not data.is_own:
        # Phantoms have the same field of view as the real slices, which may have been cropped from their canvas.
        field_mm = FIELD_MM * side / parser.get_parsed_content("canvas_size")
        phantoms, _ = phantom_slices(_PHANTOM_COUNT, seed=_PHANTOM_SEED, size=side, field_mm=field_mm)
        vectors.append(_mean_embeddings(network.encoder, phantoms.repeat(1, 3, 1, 1)))
        groups += [PHANTOMS] * len(phantoms)
    return np.concatenate(vectors), groups


def draw_embeddings(vectors: np.ndarray, groups: list[str]) -> Figure | None:
    """Draw embeddings in two dimensions, with a colour and marker for each group.

    Source: paper figure 1; van der Maaten and Hinton, "Visualizing Data using t-SNE", JMLR 2008.

    Args:
        vectors: (N, C).
        groups: the group of each; if there are more than 12, the smallest are drawn as one group, `others`.

    Returns:
        the figure, which is not registered with pyplot; None if there are fewer than 7 vectors.
    """
    if len(vectors) < _FEWEST:
        return None
    perplexity = min(_LARGEST_PERPLEXITY, (len(vectors) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=_SEED).fit_transform(vectors)
    if len(set(groups)) > _MOST_GROUPS:
        largest = {name for name, _ in Counter(groups).most_common(_MOST_GROUPS - 1)}
        groups = [group if group in largest else _OTHERS for group in groups]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    named = sorted(set(groups) - {_OTHERS, PHANTOMS})
    for number, name in enumerate(named):
        colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number // len(COLOURS) % len(_MARKERS)]
        _scatter(axes, points, groups, name, color=colour, marker=marker)
    _scatter(axes, points, groups, _OTHERS, color=_NEUTRAL, marker="s")
    _scatter(axes, points, groups, PHANTOMS, color="black", marker="x")
    axes.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return figure


def _is_frozen(cell: Cell) -> bool:
    """Return whether a cell's bundle has a knob to train the encoder, and it is off."""
    return evaluation_parser(cell, dataset_dir="").get("trainable_encoder", True) is False


@torch.no_grad()
def _mean_embeddings(encoder: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    """Encode images Nx3xHxW in 0..255 and average over space, (N, 256)."""
    device = next(encoder.parameters()).device
    means = [encoder(batch.to(device)).mean(dim=(2, 3)).cpu() for batch in images.split(_BATCH_SIZE)]
    return torch.cat(means).numpy()


def _scatter(axes: Axes, points: np.ndarray, groups: list[str], name: str, *, color: str, marker: str) -> None:
    """Draw the points (N, 2) of one group, if it has any."""
    chosen = np.array([group == name for group in groups])
    if chosen.any():
        x, y = points[chosen].T
        axes.scatter(x, y, s=22, color=color, marker=marker, linewidths=1, label=name)
