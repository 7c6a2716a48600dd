"""The networks that correct segmentations by clicks: an encoder, and a corrector on its embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from components.networks.click_corrected_sam import ClickCorrectedSam, ClickCorrectedSam2
from components.networks.click_head import ClickHead
from components.pretrained import pretrained_file
from components.sam.checkpoint import read_checkpoint
from components.sam.defaults import default_image_size
from components.sam.encoder import SamEncoder, fingerprint
from components.sam.encoders import GENERAL_UNET, PHANTOM_UNET, SHIPPED, encoder_type, encoder_weights
from components.sam.sam2_decoder import Sam2FeatureMaps

ClickEncoder = SamEncoder | Sam2FeatureMaps

_HEADS = {PHANTOM_UNET: "click_head.pt", GENERAL_UNET: "general_click_head.pt"}


def has_own_corrector(model_type: str) -> bool:
    """Return whether a decoder for clicks is in the file of an encoder of `components.sam.encoders.ENCODERS`."""
    entry = encoder_type(model_type)
    return model_type not in SHIPPED and (entry.has_sam_decoder or entry.has_sam2_decoder)


def click_encoder(shipped: str | None, *, crop_size: int, encoder: SamEncoder | None = None) -> ClickEncoder:
    """Return the encoder on whose embeddings clicks correct a network's segmentation.

    It is the network's own if SAM's or SAM 2.1's decoder is in its file. Else it is one that comes with the package,
    frozen, and the network's own encoder may be any, or be trained.

    Args:
        shipped: one of `components.sam.encoders.SHIPPED`; None if no head of the package corrects the bundle's images.
        crop_size: side in pixels of the slices as the network is shown them.
        encoder: the network's own; None if it has none.

    Raises:
        ValueError: if there is no such encoder, or none for the bundle's images.
    """
    if encoder is not None and has_own_corrector(encoder.model_type):
        return Sam2FeatureMaps(encoder) if encoder_type(encoder.model_type).has_sam2_decoder else encoder
    if shipped is None:
        raise ValueError(
            "clicks correct hearts, pictures, and bundles on a SAM or SAM 2.1 checkpoint: received volumes of another "
            "kind, on which they did not help; make the bundle with autosam new --encoder vit_b --checkpoint FILE"
        )
    if shipped not in SHIPPED:
        raise ValueError(f"no encoder {shipped!r} for clicks comes with the package: expected {' or '.join(SHIPPED)}")
    return SamEncoder(shipped, pretrained_file(f"{shipped}.pth"), default_image_size(shipped, crop_size))


def click_corrector(encoder: ClickEncoder, checkpoint: str | None = None) -> nn.Module:
    """Return the network that corrects slices by clicks, on the embeddings of an encoder.

    It is a `ClickHead` with weights of the package for encoders of the package, and the decoder of their file for
    SAM's and SAM 2.1's.

    Args:
        encoder: as `click_encoder` returns it.
        checkpoint: its file; not needed for an encoder of the package.

    Returns:
        a `ClickCorrector` on the encoder's device. It raises ValueError if the encoder has other weights than its file.

    Raises:
        ValueError: if there is no such network for the encoder or in its file, or the encoder is trained.
        FileNotFoundError: if the file is missing.
    """
    if isinstance(encoder, Sam2FeatureMaps):
        encoder = encoder.encoder
    name = encoder.model_type
    path = pretrained_file(f"{name}.pth") if name in SHIPPED else checkpoint
    if path is None or not (name in SHIPPED or has_own_corrector(name)):
        file = "" if path else ", which has no file"
        raise ValueError(
            f"clicks are corrected on {', '.join(SHIPPED)} or a SAM or SAM 2.1 checkpoint: received the encoder "
            f"{name}{file}; make the bundle anew with autosam new, whose configs/correct.json brings an encoder"
        )
    state = encoder_weights(read_checkpoint(path), name, encoder.image_encoder.state_dict(), path=path)
    of_file = fingerprint(state)

    def check_encoder(*_: Any) -> None:
        if encoder.trainable or not torch.equal(encoder.state_dict()["fingerprint"].cpu(), of_file):
            raise ValueError(
                f"the encoder was trained further than {path}, and the network of clicks does not know it: give a "
                "bundle that was trained with --trainable_encoder False"
            )

    if encoder.trainable:
        check_encoder()
    corrector: nn.Module
    if name in SHIPPED:
        corrector = ClickHead(start_checkpoint=pretrained_file(_HEADS[name]))
    else:
        with_sams = ClickCorrectedSam2 if encoder_type(name).has_sam2_decoder else ClickCorrectedSam
        corrector = with_sams(path, encoder.image_size)
    corrector.requires_grad_(False).eval().to(encoder.pixel_mean.device)
    corrector.register_forward_pre_hook(check_encoder)
    return corrector
