"""An exported network, computed by ONNX Runtime or OpenVINO."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from monai.utils import optional_import
from torch import nn

from components.base.precision import auto_is_bf16, check_precision

_Session = Callable[[np.ndarray], np.ndarray]


class OnnxNetwork(nn.Module):
    """The network in a file of MONAI's `onnx_export`, computed by another engine than torch.

    ONNX Runtime runs on CUDA if it can. Otherwise both take as many CPU threads as torch has.

    Args:
        path: the file.
        engine: `onnxruntime`, or `openvino` for CPUs.
        precision: `fp32`, `bf16` for OpenVINO only, or `auto`: bf16 where `components.base.precision` takes it.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if the engine is not installed.
        ValueError: if engine or precision is unknown, or the engine does not compute in this precision.
    """

    def __init__(self, path: str, engine: str = "onnxruntime", precision: str = "auto") -> None:
        super().__init__()
        check_precision(precision)
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}: expected {' or '.join(ENGINES)}")
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no exported network at {path}: write it by `onnx_export`, or give --onnx_path FILE"
            )
        self._session = ENGINES[engine](path, precision)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Segment images.

        Args:
            images: BxCxHxW, of the exported shape.

        Returns:
            raw logits, of the same type and on the same device as `images`.
        """
        return torch.from_numpy(self._session(images.cpu().contiguous().numpy())).to(images)


def _onnx_runtime(path: str, precision: str) -> _Session:
    if precision == "bf16":
        raise ValueError("ONNX Runtime computes in fp32 here: give --precision auto, or --engine openvino")
    onnxruntime = _installed("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    available = onnxruntime.get_available_providers()
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    session = onnxruntime.InferenceSession(path, options, [name for name in wanted if name in available])
    name = session.get_inputs()[0].name

    def run(images: np.ndarray) -> np.ndarray:
        (logits,) = session.run(None, {name: images})
        return logits

    return run


def _openvino(path: str, precision: str) -> _Session:
    in_bf16 = precision == "bf16" or (precision == "auto" and auto_is_bf16("cpu"))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if in_bf16 else "f32",
    }
    model = _openvino_core().compile_model(path, "CPU", settings)

    def run(images: np.ndarray) -> np.ndarray:
        return model(images)[0].copy()  # the next call overwrites it

    return run


@functools.cache
def _openvino_core() -> Any:
    """Return the only core of the process, since several can crash it (ultralytics pull request 25864)."""
    return _installed("openvino").Core()


ENGINES: dict[str, Callable[[str, str], _Session]] = {"onnxruntime": _onnx_runtime, "openvino": _openvino}


def _installed(name: str) -> ModuleType:
    module, found = optional_import(name)
    if not found:
        raise ImportError(f"{name} is missing: pip install -c constraints.txt -e '.[onnx]'")
    return module
