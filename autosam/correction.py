"""One image that is corrected by clicks again and again, from Python."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose

from components.data.clicks import read_clicks
from components.inference.correction import EMBEDDINGS, only_item, original_shape


class Correction:
    """A volume or picture with the network's answer, which clicks correct; `Segmenter.correction` makes one.

    The network runs at the first call. An encoder sees each slice at the first call that has a click there.

    Args:
        parser: `inference.json` and `correct.json` with the image as `dataset_dir`, and the network with its weights.

    Attributes:
        image: as the network is shown it, CxSxSxD with slices last.
    """

    def __init__(self, parser: ConfigParser) -> None:
        self._item = only_item(parser.get_parsed_content("dataset"), parser.get_parsed_content("dataset_dir"))
        self.image: MetaTensor = self._item["image"]
        self._network: Any = parser.get_parsed_content("network").eval()
        self._device = parser.get_parsed_content("device")
        self._inferer: Any = parser.get_parsed_content("inferer")
        self._smoothing = Compose(parser.get_parsed_content("smoothing"))
        self._correct: Any = parser.get_parsed_content("correction")

    def __call__(self, clicks: Mapping[str, Any] | str) -> MetaTensor:
        """Correct the network's answer, not that of an earlier call.

        Args:
            clicks: all clicks so far, as for `Segmenter.correct`.

        Returns:
            labels as `Segmenter.correct`.

        Raises:
            ValueError: if a click does not fit the image.
            FileNotFoundError: if there is no file of clicks.
        """
        read_clicks(clicks, self._correct.class_names, original_shape(self.image))
        self._correct.clicks = clicks
        return self._correct(self._answer)["pred"].to(torch.uint8).cpu()

    def forget_embeddings(self) -> None:
        """Free the memory of all slices that had clicks; the next call encodes those that it needs."""
        self._answer[EMBEDDINGS].clear()

    @cached_property
    def _answer(self) -> dict[Any, Any]:
        with torch.no_grad():
            (scores,) = self._inferer(self.image[None].to(self._device), self._network)
        answer = MetaTensor(scores.as_tensor()).copy_meta_from(self.image)
        return {**self._smoothing({**self._item, "pred": answer}), EMBEDDINGS: {}}
