"""The network that corrects the segmentations of an encoder by clicks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from components.networks.click_corrected_sam import ClickCorrectedSam
from components.networks.click_head import ClickHead
from components.networks.corrector import ClickCorrector
from components.pretrained import pretrained_file
from components.sam.checkpoint import read_checkpoint
from components.sam.encoder import SamEncoder, fingerprint
from components.sam.encoders import PHANTOM_UNET, SHIPPED, encoder_type, encoder_weights


def has_click_corrector(model_type: str) -> bool:
    """Return whether `click_corrector` has a network for an encoder, one of `components.sam.encoders.ENCODERS`."""
    return model_type == PHANTOM_UNET or (model_type not in SHIPPED and encoder_type(model_type).has_sam_decoder)


def click_corrector(encoder: SamEncoder, checkpoint: str | None = None) -> nn.Module:
    """Return the network that corrects the slices of an encoder by clicks.

    It is a `ClickHead` with the weights of the package for `phantom_unet`, and SAM's own decoder for SAM's encoders.

    Args:
        encoder: the encoder.
        checkpoint: its file. For `phantom_unet` it is that of the package.

    Returns:
        a `ClickCorrector` on the encoder's device. It raises ValueError if the encoder has other weights than its file.

    Raises:
        ValueError: if there is no such network for the encoder, or the encoder is trained.
        FileNotFoundError: if the file is missing.
    """
    name = encoder.model_type
    path = pretrained_file(f"{name}.pth") if name in SHIPPED else checkpoint
    if not has_click_corrector(name) or path is None:
        file = "" if path else ", which has no file"
        raise ValueError(
            f"so far, clicks correct bundles on {PHANTOM_UNET} or a SAM checkpoint only: received the encoder "
            f"{name}{file}; make such a bundle with autosam new --encoder vit_b --checkpoint FILE"
        )
    state = encoder_weights(read_checkpoint(path), name, encoder.image_encoder.state_dict(), path=path)
    of_file = fingerprint(state)

    def check_encoder(*_: Any) -> None:
        if encoder.trainable or not torch.equal(encoder.fingerprint.cpu(), of_file):
            raise ValueError(
                f"the encoder was trained further than {path}, and the network of clicks does not know it: give a "
                "bundle that was trained with --trainable_encoder False"
            )

    if encoder.trainable:
        check_encoder()
    corrector: ClickCorrector = (
        ClickHead(start_checkpoint=pretrained_file("click_head.pt")).requires_grad_(False).eval() if name in SHIPPED else ClickCorrectedSam(path, encoder.image_size)
    )
    corrector.to(encoder.pixel_mean.device).register_forward_pre_hook(check_encoder)
    return corrector
