"""Tissues of a phantom, and the label of each."""

from enum import IntEnum


class Tissue(IntEnum):
    """Codes of a tissue map."""

    AIR = 0
    FAT = 1
    MUSCLE = 2
    LUNG = 3
    LUNG_VESSEL = 4
    ABDOMINAL_FAT = 5
    LIVER = 6
    LIVER_VESSEL = 7
    ORGAN = 8
    STOMACH = 9
    STOMACH_WALL = 10
    BONE = 11
    GREAT_VESSEL = 12
    VESSEL_WALL = 13
    PERICARDIAL_FAT = 14
    RV_WALL = 15
    RV_POOL = 16
    RV_TRABECULA = 17
    MYO = 18
    LV_POOL = 19
    LV_PAPILLARY = 20
    BOWEL = 21
    DISC_A = 22  # round structures other than organs, and the rings around them
    RING_A = 23
    DISC_B = 24
    RING_B = 25
    RIGHT_ATRIUM = 26


_LABELS = {"RV_POOL": 1, "RV_TRABECULA": 1, "MYO": 2, "LV_POOL": 3, "LV_PAPILLARY": 3}
TISSUE_LABELS = tuple(_LABELS.get(tissue.name, 0) for tissue in Tissue)
