"""Labels that a network gives to volumes without one, for it to train on (self-training)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from monai.inferers import Inferer
from monai.transforms import Transform, apply_transform


class PseudoLabeld(Transform):
    """Give a volume the label that a network predicts with all the views and the smoothing of an inference.

    So what the average over the views knows is taught to every single view: Lee, "Pseudo-Label", ICML Workshop on
    Challenges in Representation Learning 2013. The network labels as it is when it is asked: before the first step of a
    training, also of a resumed one, that is with the weights from which the training starts.

    Args:
        network: maps slices BxNxHxW to logits BxCxHxW; is left in evaluation mode.
        inferer: takes volumes BxNxHxWxD through the network, such as `components.evaluation.TurnedSliceInferer`.
        preprocessing: from the volume's `image` to the network's N channels, or None.
        postprocessing: from the item `pred`, CxHxWxD logits or probabilities, to labels 1xHxWxD.
        device: where the network is.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        inferer: Inferer,
        *,
        postprocessing: Callable,
        preprocessing: Callable | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.network = network
        self.inferer = inferer
        self.preprocessing = preprocessing
        self.postprocessing = postprocessing
        self.device = device

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Label one volume.

        Args:
            data: with `image`, grey values 0..255 on the canvas, 1xHxWxD.

        Returns:
            the dictionary with `label`, 1xHxWxD.
        """
        shown: Any = data if self.preprocessing is None else apply_transform(self.preprocessing, dict(data))
        self.network.eval()
        with torch.no_grad():
            predicted: Any = self.inferer(shown["image"][None].to(self.device), self.network)
        labelled: Any = apply_transform(self.postprocessing, {"pred": predicted[0].float().cpu()})
        return {**data, "label": labelled["pred"]}
