"""Export of a pre-trained encoder and its heads as initial weights of other runs, with a record of their origin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Engine, Events
from torch import nn

from components.base.atomic_write import write_atomically
from components.base.weights import fixed_random_weights
from components.networks.heads import ViTHead
from components.networks.prompt_free_sam import PromptFreeSam
from components.pretraining.joint_head import JointHead
from components.pretraining.record import EXPORT_RECORD_FILENAME, TRAINING_RECORD_FILENAME, package_versions
from components.sam.decoder import build_decoder
from components.sam.encoder import SamEncoder
from components.training.checkpoint_folder import MODEL_FILENAME


def export_network(
    network: PromptFreeSam, *, ckpt_dir: str, export_dir: str, trained_with: Mapping[str, Any]
) -> PromptFreeSam:
    """Write the parts of a trained network in fp16, and rebuild the network from the written files.

    `<model_type>.pth` is a SAM checkpoint, see `sam_state`. For each head `<name>_head.pt` is a `model.pt` of that
    head on the frozen encoder in fp16. An older record is removed first, and `ExportRecord` writes the new one last, so
    a folder without `record.json` is unfinished.

    Args:
        network: a `SamEncoder` with a `JointHead`; `model.pt` is loaded into it.
        ckpt_dir: folder with the trained `model.pt`.
        export_dir: folder of the files, made if missing.
        trained_with: training record of every head's file, as `components.networks.PromptFreeSam` takes it.

    Returns:
        a network with the same heads and a frozen encoder, all weights read from the written files.

    Raises:
        FileNotFoundError: if there is no `model.pt`.
    """
    network.load_state_dict(_trained_state(ckpt_dir))
    folder, trained, device = Path(export_dir), cast(SamEncoder, network.encoder), next(network.parameters()).device
    heads = dict(cast(nn.ModuleDict, network.head.heads).items())

    (folder / EXPORT_RECORD_FILENAME).unlink(missing_ok=True)
    sam_checkpoint = folder / f"{trained.model_type}.pth"
    _save_in_fp16(sam_state(trained, cast("ViTHead | None", heads.get("vit"))), sam_checkpoint)
    encoder = SamEncoder(trained.model_type, str(sam_checkpoint), trained.image_size)
    for name, head in heads.items():
        path = folder / f"{name}_head.pt"
        alone = PromptFreeSam(encoder, head, network.precision, trained_with=trained_with)
        _save_in_fp16(alone.state_dict(), path)
        alone.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return PromptFreeSam(encoder, JointHead(heads), network.precision).to(device)


def export_model(*, ckpt_dir: str, path: str) -> None:
    """Write a trained network in fp16, as initial weights of other runs.

    Args:
        ckpt_dir: folder with the trained `model.pt`.
        path: the file; its folder is made if missing.

    Raises:
        FileNotFoundError: if there is no `model.pt`.
    """
    _save_in_fp16(_trained_state(ckpt_dir), Path(path))


def _trained_state(ckpt_dir: str) -> dict[str, torch.Tensor]:
    model = Path(ckpt_dir) / MODEL_FILENAME
    if not model.is_file():
        raise FileNotFoundError(
            f"no trained model at {model}: train first, or say where its checkpoints are with --ckpt_dir"
        )
    return torch.load(model, map_location="cpu", weights_only=True)


def sam_state(encoder: SamEncoder, head: ViTHead | None) -> dict[str, torch.Tensor]:
    """Arrange an encoder and a ViT head as a SAM checkpoint, which `SamEncoder` and `ViTHead` load strictly.

    SAM's tokens are the mean of the head's tokens over the classes, and SAM's four hypernetworks are copies of the
    head's. Parts that the head does not use were not trained and are initialised with a constant seed. These are the
    IoU head, the embeddings of points and the downscaling of masks, so the file cannot be used with prompts.
    Without a ViT head, the file holds the encoder alone.

    Args:
        encoder: the trained encoder.
        head: the trained head; None if none was trained.

    Returns:
        a flat state dict in SAM's own layout, detached, on the CPU.
    """
    parts: dict[str, nn.Module] = {"image_encoder": encoder.image_encoder}
    if head is not None:
        with fixed_random_weights():
            decoder, prompts = build_decoder(image_size=encoder.image_size)
        decoder.transformer.load_state_dict(head.transformer.state_dict())
        decoder.output_upscaling.load_state_dict(head.output_upscaling.state_dict())
        for mlp in decoder.output_hypernetworks_mlps:
            mlp.load_state_dict(head.hypernetwork.state_dict())
        tokens = head.tokens.detach().mean(dim=0)
        decoder.iou_token.weight.data.copy_(tokens[:1])
        decoder.mask_tokens.weight.data.copy_(tokens[1:])
        prompts.no_mask_embed.weight.data.copy_(head.no_mask_embed)
        prompts.pe_layer.positional_encoding_gaussian_matrix.copy_(head.frequencies)
        parts |= {"prompt_encoder": prompts, "mask_decoder": decoder}
    return {
        f"{name}.{key}": value.detach().cpu()
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }


class ExportRecord:
    """Ignite handler that writes `record.json` beside the exported files once they have been evaluated.

    It holds each head's Dice by class on the validation phantoms, the SHA-256 of every file, and the record of the
    training that `components.pretraining.TrainingRecord` wrote.

    Args:
        ckpt_dir: folder with the record of the training.
        export_dir: folder of the exported files.
        heads: names of the heads; the evaluator's metric of a head is `val_<name>_dice`.
        class_names: names of the foreground classes.
        phantoms: arguments by which the validation phantoms were drawn, by name.

    Raises:
        FileNotFoundError: if there is no record of the training.
    """

    def __init__(
        self,
        *,
        ckpt_dir: str,
        export_dir: str,
        heads: Sequence[str],
        class_names: Sequence[str],
        phantoms: Mapping[str, Any],
    ) -> None:
        path = Path(ckpt_dir) / TRAINING_RECORD_FILENAME
        if not path.is_file():
            raise FileNotFoundError(f"no record of the training at {path}: give its checkpoints' folder by --ckpt_dir")
        self.training = json.loads(path.read_text())
        self.folder = Path(export_dir)
        self.heads = tuple(heads)
        self.class_names = tuple(class_names)
        self.phantoms = dict(phantoms)

    def attach(self, engine: Engine) -> None:
        """Register the handler on an evaluator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the record."""
        files = [f"{self.training['settings']['model_type']}.pth", *(f"{name}_head.pt" for name in self.heads)]
        content = {
            "dice": {name: self._scores(engine, name) for name in self.heads},
            "dice_on": self.phantoms,
            "sha256": {file: hashlib.sha256((self.folder / file).read_bytes()).hexdigest() for file in files},
            "exported_with": package_versions(),
            "training": self.training,
        }
        with write_atomically(self.folder / EXPORT_RECORD_FILENAME) as partial:
            partial.write_text(json.dumps(content, indent=4) + "\n")

    def _scores(self, engine: Engine, head: str) -> dict[str, float]:
        metrics, metric = engine.state.metrics, f"val_{head}_dice"
        by_class = {name: round(metrics[f"{metric}_{name}"], 4) for name in self.class_names}
        return {**by_class, "mean": round(metrics[metric], 4)}


def _save_in_fp16(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Save a state dict in fp16; equal weights give equal bytes."""
    halved = {key: value.cpu().half() if value.is_floating_point() else value.cpu() for key, value in state.items()}
    # an open file, since torch would write the name of a path into the content
    with write_atomically(path) as partial, partial.open("wb") as file:
        torch.save(halved, file)
