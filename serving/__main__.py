"""Serve the bundles to 3D Slicer, OHIF or any client of MONAI Label.

From the repository's root: `python -m serving --studies DIR`, in an environment of its own with the packages of
`constraints-label.txt`. `--bundle FOLDER` serves a trained bundle that `python -m adapt new` has made.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import fire

from release.bundles import COMPLETE
from serving.app import assemble_app


def serve(
    studies: str,
    app_dir: str = "monailabel_app",
    bundle: str = ",".join(COMPLETE),
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Assemble the app and start MONAI Label's server.

    Args:
        studies: folder of the volumes to label, or a DICOMweb address.
        app_dir: folder of the app, made if missing; what the bundles learn stays in it.
        bundle: those to serve, separated by commas: names, or folders of bundles for one's own data.
        host: address to listen at; `0.0.0.0` for every one of this machine's.
        port: to listen at.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    bundles = bundle if isinstance(bundle, tuple | list) else bundle.split(",")
    app, names = assemble_app(Path(app_dir).resolve(), bundles)
    conf = {"models": ",".join(names), "zoo_source": "local", "sam2": "false"}
    settings = [text for name, value in conf.items() for text in ("--conf", name, value)]
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", studies]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(app), os.environ.get("PYTHONPATH")]))}
    address = ["--host", host, "--port", str(port)]
    raise SystemExit(subprocess.run([*command, *settings, *address], env=environment, check=False).returncode)


if __name__ == "__main__":
    fire.Fire(serve)
