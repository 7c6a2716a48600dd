"""Settings of a run: the sections to measure and their sizes."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SECTIONS = ("encoder", "engines", "epoch", "cell", "inference", "clicks", "cohort")


@dataclass(frozen=True)
class Settings:
    """Settings of one run; all sizes are smaller in a quick run.

    Args:
        output_dir: folder for the tables and the plot.
        model_type: the encoder, as `components.sam.SamEncoder` names it.
        sections: the sections to run, some of `SECTIONS`.
        rounds: number of timings of each contender.
        quick: whether to use sizes for a smoke test, whose numbers mean nothing.
    """

    output_dir: Path
    model_type: str = "vit_b"
    sections: tuple[str, ...] = SECTIONS
    rounds: int = 3
    quick: bool = False

    @property
    def device(self) -> torch.device:
        """The GPU if there is one, else the CPU."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def encoder_cases(self) -> tuple[tuple[int, int], ...]:
        """Image side in pixels and batch size of each case, largest image first."""
        if self.quick:
            return ((128, 1), (64, 1), (64, 4))
        return ((1024, 1), (512, 1), (256, 1), (256, 4))

    @property
    def shipped_case(self) -> tuple[int, int]:
        """Image side in pixels and batch size of the shipped encoder, as inference shows it hearts."""
        return (32, 1) if self.quick else (192, 8)

    @property
    def image_size(self) -> int:
        """Side in pixels at which training and inference encode."""
        return 64 if self.quick else 1024

    @property
    def canvas_size(self) -> int:
        """Side in pixels of a slice and of its logits."""
        return 64 if self.quick else 256

    @property
    def epoch_slices(self) -> int:
        """Slices of a timed training epoch."""
        return 4 if self.quick else 8

    @property
    def volume_depths(self) -> tuple[int, int]:
        """Slices of the two volumes that inference is timed on."""
        return (2, 5) if self.quick else (2, 8)

    @property
    def cohort(self) -> dict[str, Any]:
        """Arguments of `write_phantom_dataset` for the cohort: patients of two volumes each."""
        return {"patients": 2, "size_hw_d": (32, 32, 2)} if self.quick else {"patients": 8}

    @property
    def cohort_workers(self) -> tuple[int, ...]:
        """Numbers of workers that segment the cohort."""
        return (1, 2) if self.quick else (1, 2, 4)

    @property
    def gemm_size(self) -> int:
        """Side of the square matrices whose product gives the machine's peak speed."""
        return 512 if self.quick else 4096

    @property
    def turn_seconds(self) -> float:
        """Minimum seconds of a contender's turn; faster work is repeated."""
        return 0.0 if self.quick else 0.3


def describe_host(settings: Settings) -> str:
    """Describe the machine in one line."""
    if settings.device.type == "cuda":
        name = torch.cuda.get_device_name(settings.device)
    else:
        name = f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"
    load = f", load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}{load}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
