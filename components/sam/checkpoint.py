"""Checkpoint files in SAM's own layout: their paths, and how to read them and load their parts."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from components.base.weights import join_keys, read_state_dict
from components.sam.sam2_encoder import SAM2_ARCHITECTURES, sam2_image_encoder

# The file names of Meta, and of MobileSAM, by model type; `adapt/template/networks.json` has addresses and checksums.
CHECKPOINT_FILES = {
    "vit_b": "sam_vit_b_01ec64.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_h": "sam_vit_h_4b8939.pth",
    "vit_t": "mobile_sam.pt",
    **{name: f"{name}.pt" for name in SAM2_ARCHITECTURES},
}
CHECKPOINT_PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")


def weights_file(path: str) -> str:
    """Return the file of a checkpoint: the path itself, or `model.safetensors` in a folder of the Hugging Face Hub."""
    return str(Path(path) / "model.safetensors") if Path(path).is_dir() else path


def read_sam_checkpoint(path: str) -> dict[str, dict[str, torch.Tensor]]:
    """Read a checkpoint in SAM's own layout, or the image encoder of one of SAM 2.

    Args:
        path: a `.pth` file holding a state dict with the keys `image_encoder.*`, `prompt_encoder.*` and
            `mask_decoder.*`, flat or wrapped as `read_state_dict` unwraps it. For SAM 2, Meta's file, or a
            `model.safetensors` of `transformers`, or the folder of the Hugging Face Hub that has it.

    Returns:
        the state dicts of the three parts, by part name, prefixes removed, on the CPU. Of SAM 2 only the image encoder
        has weights here, since its decoder is another.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a state dict; the message names the unexpected keys.
    """
    path = weights_file(path)
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no SAM checkpoint at {Path(path).absolute()}: a bundle's own paths begin at the working directory, so "
            "run inside its folder or give --bundle_root FOLDER (monai.bundle.load: args_file={'bundle_root': FOLDER})."
            " Files that do not come with it are downloaded there by `python -m monai.bundle download_large_files`; "
            "otherwise give --sam_checkpoint FILE, or '$None' for an encoder with random weights"
        )
    state = read_state_dict(path, kind="SAM checkpoint", remedy="download it again", is_key=_is_key)
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in CHECKPOINT_PARTS}
    parts["image_encoder"] = sam2_image_encoder(state)
    if parts["image_encoder"]:
        return parts
    unexpected = []
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if _is_key(key):
            parts[part][rest] = value
        else:
            unexpected.append(key)
    if unexpected:
        raise ValueError(
            f"{path} is not a SAM checkpoint: expected only keys that begin with "
            f"{', '.join(part + '.' for part in CHECKPOINT_PARTS)}; received also {join_keys(unexpected)}"
        )
    return parts


def _is_key(key: str) -> bool:
    part, _, rest = key.partition(".")
    return part in CHECKPOINT_PARTS and rest != ""


def load_part(module: nn.Module, part: str, state: Mapping[str, torch.Tensor], *, path: str) -> None:
    """Load one part of a SAM checkpoint strictly; if a key does not fit, nothing is changed.

    Args:
        module: receives the weights.
        part: its name in the checkpoint, such as `image_encoder`.
        state: its state dict, as `read_sam_checkpoint` returns it.
        path: the checkpoint's file, for messages.

    Raises:
        ValueError: if a key is missing, extra or misshapen; the message names it.
    """
    expected = module.state_dict()
    faults = []
    missing = [f"{part}.{key}" for key in expected if key not in state]
    extra = [f"{part}.{key}" for key in state if key not in expected]
    misshapen = [
        f"{part}.{key} (expected {tuple(value.shape)}, received {tuple(state[key].shape)})"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    for fault, keys in (("missing", missing), ("extra", extra), ("misshapen", misshapen)):
        if keys:
            faults.append(f"{fault}: {join_keys(keys)}")
    if faults:
        raise ValueError(
            f"{path} does not fit this {part} ({'; '.join(faults)}): "
            "give --sam_checkpoint an official checkpoint of the same --model_type"
        )
    module.load_state_dict(state)
