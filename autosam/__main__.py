"""The command `autosam`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Context, Option

from autosam.folders import DEFAULT
from autosam.options import KNOB_OPTIONS, SETTINGS
from autosam.record import typed_knobs

app = typer.Typer(
    help="Segment medical images, and adapt Segment Anything (SAM) to yours from a few labelled ones.",
    epilog="Example: autosam segment volume.nii.gz",
    **SETTINGS,
)
_KNOBS = {"allow_extra_args": True, "ignore_unknown_options": True}

Bundle = Annotated[str, Argument(help="a bundle's folder, or the name of one that comes with the package")]
Data = Annotated[str, Option(help="folder of the labelled cases")]
DryRun = Annotated[bool, Option("--dry-run", help="print the command of MONAI's runner, and stop")]
Verbose = Annotated[bool, Option("--verbose", help="show MONAI's lines, which go to a log file")]


def command(example: str, *, knobs: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command with an example; with `knobs` it takes those of the bundle's configs as well."""
    more = "\n\nOther options are knobs of the bundle's configs, such as --batch_size 8." if knobs else ""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        about = (function.__doc__ or "").split("\n\n")[0]
        return app.command(help=about + more, epilog=f"Example: {example}", context_settings=_KNOBS if knobs else None)(
            function
        )

    return add


@command("autosam segment volume.nii.gz -o results", knobs=True)
def segment(
    context: Context,
    image: Annotated[
        Path,
        Argument(metavar="IMAGE", help="a volume, cine, picture or DICOM study, a folder, or a CSV list: id,path"),
    ],
    output: Annotated[Path, Option("--output", "-o", help="folder of the results")] = Path("segmented"),
    bundle: Annotated[str, Option(help="a bundle's folder or name")] = DEFAULT,
    measure: Annotated[bool, Option("--measure", help="hearts: also volumes and ejection fractions")] = False,
    workers: Annotated[int, Option(help="processes of one thread that share the cases")] = 1,
    scheduler: Annotated[str | None, Option(help="a Dask cluster instead: its address or file")] = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Segment images with a bundle, and draw a picture of each. The same command goes on where it was stopped."""
    from autosam import workflows

    workflows.segment(
        image,
        output,
        bundle,
        typed_knobs(context.args),
        measure=measure,
        dry_run=dry_run,
        verbose=verbose,
        workers=workers,
        scheduler=scheduler,
    )


@command("autosam correct volume.nii.gz --clicks clicks.json", knobs=True)
def correct(
    context: Context,
    image: Annotated[Path, Argument(metavar="IMAGE", help="a volume, a picture, or a DICOM study of one volume")],
    clicks: Annotated[
        Path, Option(help='file of voxels on each class: {"LV": [[60, 71, 4]], "background": [[20, 33, 4]]}')
    ],
    output: Annotated[Path, Option("--output", "-o", help="folder of the results")] = Path("corrected"),
    bundle: Annotated[str, Option(help="a bundle's folder or name")] = "autosam_acdc",
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Segment an image, and correct the slices that you have clicked in."""
    from autosam import workflows

    workflows.correct(image, output, bundle, typed_knobs(context.args), clicks, dry_run=dry_run, verbose=verbose)


@command("autosam new my_organ /data/my_organ --network cnnhead")
def new(
    name: Annotated[str, Argument(help="name of the bundle")],
    folder: Annotated[Path, Argument(help="dataset.json, images and labels, or ACDC's layout")],
    output: Annotated[Path, Option("--output", "-o", help="where the bundle's folder is made")] = Path(),
    network: Annotated[
        str | None,
        Option(help="unet, or a head: linearhead, cnnhead, deeplabhead, autosam; by default the data decide"),
    ] = None,
    encoder: Annotated[
        str | None,
        Option(
            "--encoder", KNOB_OPTIONS["encoder"], help="encoder of a head: vit_b, sam2.1_hiera_tiny, dinov3_vits, ..."
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        Option("--checkpoint", KNOB_OPTIONS["checkpoint"], help="its file, or the folder of the Hugging Face Hub"),
    ] = None,
    classes: Annotated[str | None, Option(help="names of the classes, in the order of their values: a,b")] = None,
    turned: Annotated[str | None, Option(help="True or False: whether images may be mirrored and turned")] = None,
) -> None:
    """Make a bundle for your own labelled images."""
    from adapt.__main__ import new as make

    make(name, str(folder), str(output), network, encoder, checkpoint, classes, turned)


@command("autosam train unet_acdc --data /data/ACDC --labelled 5", knobs=True)
def train(
    context: Context,
    bundle: Bundle,
    data: Data = "",
    labelled: Annotated[int | None, Option(help="labelled cases to train on")] = None,
    overlay: Annotated[list[str] | None, Option(help="a further config: neck, unlabelled, sam, ...")] = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Train a bundle on labelled cases. One that comes with the package is copied to the working directory first."""
    from autosam import workflows

    workflows.train(bundle, data, labelled, overlay or [], typed_knobs(context.args), dry_run=dry_run, verbose=verbose)


@command("autosam evaluate ./unet_acdc", knobs=True)
def evaluate(
    context: Context,
    bundle: Bundle,
    data: Data = "",
    output: Annotated[Path | None, Option("--output", "-o", help="folder of the results")] = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Score a bundle on its test cases. Data and overlays are those of its last training."""
    from autosam import workflows

    workflows.evaluate(bundle, data, output, typed_knobs(context.args), dry_run=dry_run, verbose=verbose)


@command("autosam demo")
def demo(
    output: Annotated[Path, Option("--output", "-o", help="folder of the demo")] = Path("autosam_demo"),
    verbose: Verbose = False,
) -> None:
    """Draw synthetic patients, adapt a head to two of them and score others. It takes a few minutes."""
    from autosam import workflows

    workflows.demo(output, verbose=verbose)


@command("autosam serve /data/volumes")
def serve(
    studies: Annotated[str, Argument(help="folder of the volumes, or a DICOMweb address")],
    bundle: Annotated[str, Option(help="bundles, separated by commas")] = "",
    app_dir: Annotated[str, Option(help="folder of the app, in which trained models stay")] = "monailabel_app",
    host: Annotated[str, Option(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, Option(help="port to listen at")] = 8000,
    modality: Annotated[str, Option(help="modality of the series from a DICOMweb address")] = "MR",
    origins: Annotated[str, Option(help="other pages that may use the server, separated by commas")] = "",
    insecure: Annotated[bool, Option("--insecure", help="serve other machines without a login")] = False,
) -> None:
    """Serve bundles to 3D Slicer and OHIF by MONAI Label."""
    from serving.__main__ import serve as start

    options: dict[str, Any] = {"bundle": bundle} if bundle else {}
    start(studies, app_dir, host=host, port=port, modality=modality, origins=origins, insecure=insecure, **options)


@command("autosam pack my_organ")
def pack(
    bundle: Bundle,
    output: Annotated[str, Option("--output", "-o", help="folder of the archive")] = "dist",
    model: Annotated[str | None, Option(help="the trained model.pt, if it is not the bundle's own")] = None,
    encoder_url: Annotated[str, Option(help="address of an encoder that is too large for an archive")] = "",
) -> None:
    """Write a bundle as an archive that segments as soon as it is unpacked."""
    from autosam import workflows

    workflows.pack(bundle, output, model, encoder_url)


@command("autosam study study/quick.json --output my_study")
def study(
    grid: Annotated[str, Argument(help="JSON file of the grid")],
    output: Annotated[str, Option("--output", "-o", help="folder of the study")] = "study_results",
    data: Data = "",
    only: Annotated[str, Option(help="run only cells whose name begins so")] = "",
    workers: Annotated[int, Option(help="cells at a time")] = 1,
    retry: Annotated[bool, Option("--retry", help="run failed cells again")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="only list the cells and their time")] = False,
) -> None:
    """Run a grid of trainings and evaluations, and write its report."""
    from study.__main__ import run

    run(grid, output, data, only=only, workers=workers, retry=retry, dry_run=dry_run)


@command("autosam info")
def info() -> None:
    """Show versions, device, precision, and the bundles and encoders that are found."""
    from autosam.info import describe

    print(describe())


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Print an error as one line, and end with status 1."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception as error:
        from components.base.errors import error_message

        sys.exit(f"error: {error_message(error)}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: those after the command's name; None for this process's.
    """
    with _errors_in_one_line():
        app(arguments, prog_name="autosam")


if __name__ == "__main__":
    main()
