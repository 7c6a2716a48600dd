"""Synthetic short-axis cardiac cine MR slices: anatomy and appearance as two pure, batched functions.

Convention: images are (B, H, W), rows run down (y) and columns right (x); millimetres are measured from the centre of
the image. Without rotation the chest's front is on the left, the right ventricle to the left of the left ventricle, and
the abdomen below. `level` is 0 at the base and 1 at the apex, `phase` 0 at end-diastole (ED) and 1 at end-systole (ES).

A *draw* holds the random parameters of subjects: a dictionary of tensors whose first axis is the subject. `select`
picks and repeats subjects, so that all slices of a volume and both its phases share one anatomy and one contrast.

Unnamed numbers in the painting functions are proportions and positions, in mm, chosen by eye from real slices.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"dataset": ["write_phantom_dataset"]})
