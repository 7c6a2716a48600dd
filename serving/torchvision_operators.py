"""Make PyPI's torchvision, which is built for CUDA, importable beside a CPU build of torch.

Its Python code registers implementations for operators that its compiled library declares. That library does not load
without CUDA. MONAI Label imports torchvision but calls none of these operators, so they are declared here if the import
fails. MONAI Label's server and the processes it starts import this file as `sitecustomize`.
"""

import sys

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

try:
    import torchvision  # noqa: F401 - whether it can be imported is the question
except ModuleNotFoundError:
    pass
except RuntimeError:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
