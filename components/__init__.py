"""Everything the bundles' JSON configs name, in sub-packages that follow the data.

| sub-package | holds |
|---|---|
| `base` | files written whole or not at all, names and axes of volumes, weights, number formats |
| `embeddings` | embeddings of images, kept in memory and on disk |
| `pretrained` | the weights that come with the package |
| `sam` | Segment Anything: checkpoints, image encoder, decoder |
| `networks` | networks from images to logits: heads on SAM's encoder, and baselines |
| `phantom` | synthetic patients and slices |
| `dicom` | DICOM studies and segmentation objects |
| `data` | from files to slices, and predictions back to files |
| `training` | checkpoints, epochs, phantoms in batches, records of a run |
| `inference` | from a trained network to label maps of volumes and cines |
| `evaluation` | from predictions to scores, tables and pictures |
| `function` | cardiac function measured in label maps |
| `pretraining` | training of what comes with the package |

Each one's `__init__.py` lists what configs may name from it, such as `components.networks.CNNHead`; code imports from
the modules. A sub-package imports from those above it in this table only.

Importing the package warms up torch's CPU mathematics once. In torch 2.13 (oneMKL 2024.2), a process's
first call of `sqrt`, `exp` or another vectorised function may be imprecise on one of its threads. See
https://github.com/pytorch/pytorch/issues/188792. The first forward pass then has an error of 1e-3, the second none.
One call on a single element, which never leaves the calling thread, takes that first call out of every real
computation.

In a process that is `python -m monai.bundle` it does two things more. The last line of an error becomes one sentence,
by `components.base.errors`. The process ends without a last collection of garbage. A program that imports the
package keeps its own exception hook.
"""

import atexit
import gc
import importlib
import os
import sys

import torch

__version__ = "0.18.0"


def _warm_up_cpu_math() -> None:
    one = torch.ones(1)
    for function in (torch.sqrt, torch.rsqrt, torch.exp, torch.log, torch.sin, torch.cos, torch.tanh, torch.erf):
        function(one)


def is_bundle_command() -> bool:
    """Return whether this process is `python -m monai.bundle`, not a host or a test that imports MONAI."""
    # `python -m` leaves its module's name here, also under torchrun
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name == "monai.bundle.__main__"


def _end_with_error_line() -> None:
    if is_bundle_command() and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun has a report of its own
        sys.excepthook = importlib.import_module("components.base.errors").ErrorLine()


def _end_quickly() -> None:
    if is_bundle_command():  # at its end Python collects garbage twice among a million objects, for about a second
        atexit.register(gc.freeze)


_warm_up_cpu_math()
_end_with_error_line()
_end_quickly()
