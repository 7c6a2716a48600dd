"""Training and inference as defined by the bundle's configs, on a synthetic patient."""

from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import nn

from adapt.template import networks
from benchmarks.settings import Settings
from components.phantom.dataset import write_phantom_dataset
from components.sam.image_encoder import EMBEDDING_CHANNELS

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

CONFIGS = Path(__file__).parents[1] / "bundles" / "autosam_acdc" / "configs"
PAPER = [str(CONFIGS / name) for name in ("train.json", "sam.json")]


def _heads() -> dict[str, dict[str, Any]]:
    """List every head with the knobs of the paper's recipe, and with the default ones if they differ."""
    heads = {}
    for entry in (entry for entry in networks().values() if "head" in entry):
        defaults = entry.get("head_knobs", {})
        for knobs in (defaults | entry.get("paper_head", {}), defaults):
            name = ", ".join([entry["head"]["_target_"].split(".")[-1], *(f"{k} {v}" for k, v in knobs.items())])
            heads[name] = {key: knobs.get(str(value).removeprefix("@"), value) for key, value in entry["head"].items()}
    return heads


HEADS = _heads()


def write_patients(folder: str, settings: Settings) -> str:
    """Write a phantom dataset whose labelled frame has as many slices as a timed epoch; return its folder."""
    size = (settings.canvas_size, settings.canvas_size, settings.epoch_slices)
    return write_phantom_dataset(f"{folder}/phantoms", patients=3, size_hw_d=size)


def training_knobs(*names: str) -> dict[str, int]:
    """Read top-level numbers of the paper's recipe."""
    parser = ConfigParser()
    parser.read_config(PAPER)
    parser["train"]["dataloader"] = ["one batch"]  # epochs are computed from the number of batches; no data are needed
    return {name: parser.get_parsed_content(name) for name in names}


def training(
    settings: Settings, encoder: nn.Module, *, head: str, precision: str, dataset_dir: str, views: int
) -> ConfigParser:
    """Parse the paper's recipe with a given encoder and head, for one epoch at a time and without handlers.

    Args:
        settings: sizes of the run.
        encoder: replaces the config's encoder.
        head: a key of `HEADS`.
        precision: `fp32` or `bf16`.
        dataset_dir: as `write_patients` returns it; one frame of one patient is labelled.
        views: number of augmented views of each slice; 0 augments anew in every epoch.

    Returns:
        the parser, which instantiates `train#trainer`, `network`, `loss`, `optimizer` and the rest on request.
    """
    parser = _parser(PAPER, settings, encoder, head=head, precision=precision)
    parser.update({"dataset_dir": dataset_dir, "label_unit": "frames", "views": views, "epochs": 1})
    parser["train"]["trainer"] |= {"train_handlers": None, "key_train_metric": None}
    parser["train"]["dataset"]["progress"] = False
    parser.parse()
    return parser


def inference(settings: Settings, encoder: nn.Module, *, head: str, precision: str) -> ConfigParser:
    """Parse `inference.json` with a given encoder and head; see `training`."""
    parser = _parser([str(CONFIGS / "inference.json")], settings, encoder, head=head, precision=precision)
    parser["settings"] = {"crop_size": settings.canvas_size, "test_time_views": 1}
    parser.parse()
    return parser


def _parser(files: list[str], settings: Settings, encoder: nn.Module, *, head: str, precision: str) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(files)
    parser["network_def"] |= {"encoder": encoder, "head": HEADS[head], "precision": precision}
    parser.update({"canvas_size": settings.canvas_size, "sam_checkpoint": None, "device": settings.device})
    parser.update(training_knobs("out_channels"))  # inference otherwise reads it from a trained model
    return parser


class StoredEmbeddings(nn.Module):
    """Replaces an encoder: returns stored embeddings and ignores the images."""

    def __init__(self) -> None:
        super().__init__()
        self.current = torch.empty(0)
        self.out_channels = EMBEDDING_CHANNELS

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of the current batch."""
        return self.current


class HeadAlone:
    """Trains a head on embeddings in memory: forward, loss, backward and the optimizer's step.

    The network (and with it the precision and the size of the logits), loss and optimizer are the config's.

    Args:
        settings: sizes of the run.
        batches: embeddings Bx256xhxw, images Bx3xHxW and labels Bx1xHxW of each batch.
        head: a key of `HEADS`.
        precision: `fp32` or `bf16`.
    """

    def __init__(self, settings: Settings, batches: list[Batch], *, head: str, precision: str) -> None:
        self.batches = batches
        self.encoder = StoredEmbeddings()
        parser = training(settings, self.encoder, head=head, precision=precision, dataset_dir="", views=0)
        self.network: nn.Module = parser.get_parsed_content("network")
        self.loss = parser.get_parsed_content("loss")
        self.optimizer = parser.get_parsed_content("optimizer")

    def train(self) -> None:
        """Take a training step on every batch."""
        self.network.train()
        for embeddings, images, labels in self.batches:
            self.encoder.current = embeddings
            self.optimizer.zero_grad()
            self.loss(self.network(images), labels).backward()
            self.optimizer.step()

    def segment(self) -> torch.Tensor:
        """Run the head forward on the first batch, without gradients."""
        self.network.eval()
        self.encoder.current, images, _ = self.batches[0]
        with torch.no_grad():
            return self.network(images)
