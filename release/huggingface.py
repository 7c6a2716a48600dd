"""Bundles as repositories of the Hugging Face Hub, where MONAI's model zoo keeps its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pretrained import pretrained_file
from release.bundles import MODEL, PICTURE, pins_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_USAGE = """\
## Use from the Hub

```bash
pip install huggingface_hub {packages}
python -m monai.bundle download --source huggingface_hub --repo REPOSITORY --name {name} --bundle_dir .
```

`REPOSITORY` is the name at the top of this page: an account, a slash and `{name}`. The downloaded folder is a MONAI
Bundle with all the code that it needs. Type the commands below inside it.

"""


def write_repository(root: Path, folder: Path) -> Path:
    """Write a repository of the Hub: a bundle's files, and a model card from its README and metadata.

    Args:
        root: the bundle's folder, as `assemble` has written it.
        folder: where the repository's folder is made; an older one of that name is replaced.

    Returns:
        the repository's folder, named after the bundle.

    Raises:
        OptionalImportError: if `huggingface_hub` is not installed.
        ValueError: if it rejects the card's metadata.
    """
    from monai.utils import optional_import

    hub, _ = optional_import("huggingface_hub", descriptor="pip install huggingface_hub, or -e '.[huggingface]'")
    metadata = json.loads((root / "configs/metadata.json").read_text())
    results = _results(root, metadata)
    data = hub.ModelCardData(
        license="apache-2.0",
        library_name="monai",
        pipeline_tag="image-segmentation",
        tags=["monai", "medical", "segmentation"],
        metrics=["dice"] if results else None,
        model_name=root.name,
        eval_results=results or None,
    )
    readme = (root / "docs/README.md").read_text().replace(f"]({Path(PICTURE).name})", f"]({PICTURE})")
    title, _, rest = readme.partition("\n")
    packages = " ".join(f"{package}=={version}" for package, version in pins_of(metadata).items())
    usage = _USAGE.format(name=root.name, packages=packages)
    card = hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{title}\n\n{usage}{rest.lstrip()}")
    target = folder / root.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(root, target)
    card.save(target / "README.md")
    return target


def _results(root: Path, metadata: dict[str, Any]) -> list[EvalResult]:
    """Return the scores in a bundle's metadata, and those recorded of its head if it is the one in the package."""
    from huggingface_hub import EvalResult

    record = json.loads(Path(pretrained_file("phantom_unet.pth")).with_name("record.json").read_text())
    by_file = {pretrained_file(f"{head}_head.pt"): scores for head, scores in record["dice"].items()}
    model = (root / MODEL).read_bytes() if (root / MODEL).is_file() else b""
    dice: dict[str, Any] = next((scores for file, scores in by_file.items() if Path(file).read_bytes() == model), {})
    measured = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type="medical images",
            dataset_name=metadata["data_source"],
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in metadata["eval_metrics"].items()
    ]
    return measured + [
        EvalResult(
            task_type="image-segmentation",
            dataset_type="synthetic",
            dataset_name="synthetic short-axis slices, not seen in training",
            metric_type="dice",
            metric_name=f"Dice, {name}",
            metric_value=value,
        )
        for name, value in dice.items()
    ]
