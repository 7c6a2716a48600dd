"""Section `clicks`: what a click costs, beside the segmentation of its volume."""

from functools import partial

import torch
from monai.data import MetaTensor

import autosam
from benchmarks.report import Table
from benchmarks.settings import Settings
from benchmarks.timing import Contender, clock_of, measure, synchronizer
from components.phantom.degraded import SPACING_MM, degraded_phantom

BUNDLES = ("linearhead_acdc", "unet_acdc")
BASELINE = "segmentation"

NOTE = """
One synthetic volume in memory, by bundles as they ship. `segmentation` is all that comes before a click, from the array
on. `ours, first click` corrects a slice that no click has encoded, `ours, further click` one that is encoded.
"""


def run(settings: Settings) -> Table:
    """Time a segmentation, the first click in a slice and a further one."""
    table = Table("clicks", BASELINE, NOTE, "a volume or click")
    voxels, _ = degraded_phantom(1, 0)
    if settings.quick:
        voxels = voxels[..., :2]
    image = MetaTensor(voxels, affine=torch.diag(torch.tensor([*SPACING_MM, 1.0])))
    middle = voxels.shape[2] // 2
    clicks = {"LV": [[int(side) // 2 for side in voxels.shape[:2]] + [middle]]}
    for bundle in BUNDLES:
        segmenter = autosam.load(bundle, **({"test_time_views": 1} if settings.quick else {}))
        correction = segmenter.correction(image)
        contenders = {
            BASELINE: Contender(partial(_segment, segmenter, image)),
            "ours, first click": Contender(partial(_click_anew, correction, clicks)),
            "ours, further click": Contender(partial(correction, clicks)),
        }
        times = measure(
            contenders,
            rounds=settings.rounds,
            synchronize=synchronizer(settings.device),
            clock=clock_of(settings.device),
        )
        table.add(f"{bundle}, {voxels.shape[2]} slices", times)
    return table


def _segment(segmenter: autosam.Segmenter, image: MetaTensor) -> None:
    segmenter.correction(image)({})


def _click_anew(correction: autosam.Correction, clicks: dict[str, list[list[int]]]) -> None:
    correction.forget_embeddings()
    correction(clicks)
