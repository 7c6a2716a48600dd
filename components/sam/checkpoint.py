"""Checkpoint files in SAM's own layout: their paths, and how to read them and load their parts."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from components.base.weights import join_keys, read_state_dict

CHECKPOINT_PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
SAM_FORM = f"only keys that begin with {', '.join(part + '.' for part in CHECKPOINT_PARTS)}"


def weights_file(path: str) -> str:
    """Return the file of a checkpoint: the path itself, or `model.safetensors` in a folder of the Hugging Face Hub.

    Raises:
        ValueError: if the folder has its weights in several files.
    """
    if not Path(path).is_dir():
        return path
    file = Path(path) / "model.safetensors"
    if not file.is_file() and (Path(path) / f"{file.name}.index.json").is_file():
        raise ValueError(
            f"{path} has its weights in several files: expected one {file.name}; "
            "write it by save_pretrained(FOLDER, max_shard_size='100GB') of transformers"
        )
    return str(file)


def read_checkpoint(path: str, *, page: str = "") -> Mapping[str, torch.Tensor]:
    """Read the whole state dict of an encoder's file.

    Args:
        path: a file of `torch.save` or safetensors, flat or wrapped as `read_state_dict` unwraps it. Or a folder of the
            Hugging Face Hub with a `model.safetensors`.
        page: address of the page that offers the file, for messages.

    Returns:
        tensors by key, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read.
    """
    path = weights_file(path)
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no encoder checkpoint at {Path(path).absolute()}: a bundle's own paths begin at the working directory, "
            "so run inside its folder or give --bundle_root FOLDER "
            "(monai.bundle.load: args_file={'bundle_root': FOLDER}). "
            "Files that large_files.yml lists are downloaded there by `python -m monai.bundle download_large_files`; "
            + (f"its page is {page}; " if page else "")
            + "otherwise give --sam_checkpoint FILE, or '$None' for an encoder with random weights"
        )
    return read_state_dict(path, kind="encoder checkpoint", remedy="download it again", is_key=is_sam_key)


def read_sam_checkpoint(path: str) -> dict[str, dict[str, torch.Tensor]]:
    """Read a checkpoint in SAM's own layout.

    Args:
        path: a file holding a state dict with the keys `image_encoder.*`, `prompt_encoder.*` and `mask_decoder.*`, as
            `read_checkpoint` reads it.

    Returns:
        the state dicts of the three parts, by part name, prefixes removed, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a state dict; the message names the unexpected keys.
    """
    return sam_parts(read_checkpoint(path), path=path)


def sam_parts(state: Mapping[str, torch.Tensor], *, path: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return the parts of a whole state dict in SAM's layout; as `read_sam_checkpoint`, with the file for messages."""
    unexpected = [key for key in state if not is_sam_key(key)]
    if unexpected:
        raise ValueError(f"{path} is not a SAM checkpoint: expected {SAM_FORM}; received also {join_keys(unexpected)}")
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in CHECKPOINT_PARTS}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        parts[part][rest] = value
    return parts


def sam_image_encoder(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the image encoder's weights from a whole state dict in SAM's layout; empty for any other state dict."""
    return sam_parts(state, path="")["image_encoder"] if all(map(is_sam_key, state)) else {}


def is_sam_key(key: str) -> bool:
    """Return whether a key is one of SAM's layout."""
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
