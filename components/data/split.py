"""The split of patients, or other groups of cases, into training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

HELD_OUT_PERCENT = 15  # of the groups, for validation and for test each (paper section 4.1)

# The 70:10:20 split of SSL4MIS, a benchmark of semi-supervised methods (https://github.com/HiLab-git/SSL4MIS), in the
# order of its lists data/ACDC/*.list: its first training patients are the labelled ones.
SSL4MIS = "ssl4mis"
_SSL4MIS_NUMBERS = {
    "training": (
        "099 038 050 100 058 021 049 020 072 040 060 089 004 056 098 096 031 018 094 047 048 055 097 074 "
        "043 041 063 037 095 054 026 088 032 069 006 071 012 073 061 017 025 010 057 029 051 005 036 046 "
        "062 034 076 092 070 077 067 003 091 016 014 044 042 090 053 027 035 086 023 009 079 015"
    ),
    "validation": "028 085 082 087 019 030 078 045 002 039",
    "test": "011 013 084 033 093 022 068 024 083 081 080 001 007 066 008 065 075 064 059 052",
}


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """Return names in an order that depends on the seed only."""
    return [names[index] for index in np.random.RandomState(seed).permutation(len(names))]


def split_patients(patients: Sequence[str], seed: int | str) -> dict[str, list[str]]:
    """Split patients 70:15:15; validation and test are rounded to the nearest integer, training is the rest.

    Args:
        patients: names of patients, or other groups of cases, in a fixed order.
        seed: seed of the shuffle; or `ssl4mis` for the fixed 70:10:20 split of that benchmark.

    Returns:
        the names of each subset, in shuffled order.

    Raises:
        ValueError: for another word, or if the patients are not ACDC's 100 for `ssl4mis`.
    """
    if isinstance(seed, str):
        return _ssl4mis_split(patients, seed)
    order = shuffled(patients, seed)
    held_out = (HELD_OUT_PERCENT * len(patients) + 50) // 100
    return {
        "validation": order[:held_out],
        "test": order[held_out : 2 * held_out],
        "training": order[2 * held_out :],
    }


def _ssl4mis_split(patients: Sequence[str], name: str) -> dict[str, list[str]]:
    if name != SSL4MIS:
        raise ValueError(f"expected split_seed to be an integer or {SSL4MIS!r}, received {name!r}")
    split = {subset: [f"patient{each}" for each in text.split()] for subset, text in _SSL4MIS_NUMBERS.items()}
    expected = {patient for subset in split.values() for patient in subset}
    if missing := sorted(expected.symmetric_difference(patients)):
        raise ValueError(
            f"the split {SSL4MIS} needs patient001 to patient100, ACDC's whole training folder: {len(missing)} are "
            f"missing or extra, such as {', '.join(missing[:3])}; complete the folder, leave include_testing False, "
            "or give an integer as split_seed"
        )
    return split
