"""A network computed by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


class OnnxNetwork(nn.Module):
    """The network in a file of MONAI's `onnx_export`, computed by ONNX Runtime.

    It runs on CUDA if ONNX Runtime can, else on as many CPU threads as torch has.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if ONNX Runtime is not installed.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("ONNX Runtime is missing: pip install -c constraints.txt -e '.[onnx]'") from error
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no exported network at {path}: write it by `onnx_export`, or give --onnx_path FILE"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        available = onnxruntime.get_available_providers()
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        self._session = onnxruntime.InferenceSession(path, options, [name for name in wanted if name in available])
        self._input = self._session.get_inputs()[0].name

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Segment images.

        Args:
            images: BxCxHxW, of the exported shape.

        Returns:
            raw logits, of the same type and on the same device as `images`.
        """
        (logits,) = self._session.run(None, {self._input: images.cpu().contiguous().numpy()})
        return torch.from_numpy(logits).to(images)
