"""Serve the bundles to 3D Slicer, OHIF or any client of MONAI Label.

From the repository's root: `python -m serving --studies DIR`, in an environment of its own with the packages of
`constraints-label.txt`. `--bundle FOLDER` serves a trained bundle that `python -m adapt new` has made.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

import fire

from release.bundles import PACKED
from serving.app import assemble_app

_FILTER = "MONAI_LABEL_DICOMWEB_SEARCH_FILTER"
_LOGIN = "MONAI_LABEL_DICOMWEB_USERNAME and MONAI_LABEL_DICOMWEB_PASSWORD"
_SECONDS = 10

logger = logging.getLogger("serving")


def serve(
    studies: str,
    app_dir: str = "monailabel_app",
    bundle: str = ",".join(PACKED),
    modality: str = "MR",
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Assemble the app and become MONAI Label's server.

    Args:
        studies: folder of the volumes to label, or a DICOMweb address.
        app_dir: folder of the app, made if missing; what the bundles learn stays in it.
        bundle: those to serve, separated by commas: names, or folders of bundles for one's own data.
        modality: of the series that are served from a DICOMweb address, unless the environment has MONAI Label's
            variable `MONAI_LABEL_DICOMWEB_SEARCH_FILTER`.
        host: address to listen at; `0.0.0.0` for every one of this machine's.
        port: to listen at.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        environment = _settings_of(str(studies), modality)
        bundles = bundle if isinstance(bundle, tuple | list) else bundle.split(",")
        app, names = assemble_app(Path(app_dir).resolve(), bundles)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(app), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--uvicorn_app", "serving.server:app"]
    places = ["--app", str(app), "--studies", str(studies), "--host", host, "--port", str(port)]
    sys.stdout.flush()
    os.execve(sys.executable, [*command, *places, "--conf", "models", ",".join(names)], environment)


def _settings_of(studies: str, modality: str) -> dict[str, str]:
    """Return the environment that MONAI Label needs for its studies, once these have been found there.

    Raises:
        FileNotFoundError: for a folder that is not there, or where a program is missing that DICOM SEG needs.
        ConnectionError: when nobody answers at a DICOMweb address, or what answers is no DICOMweb server.
    """
    environment = dict(os.environ)
    if not studies.startswith(("http://", "https://")):
        if not Path(studies).is_dir():
            raise FileNotFoundError(
                f"there is no folder {studies}: expected --studies to be the folder of the volumes, or a DICOMweb "
                "address that starts with http:// or https://"
            )
        return environment
    _find_series(studies)
    # where pip puts dcmqi's programs, whether or not the environment is active
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if not shutil.which("itkimage2segimage", path=environment["PATH"]):
        raise FileNotFoundError(
            "there is no program itkimage2segimage, which writes DICOM SEG: pip install -c constraints-label.txt -e "
            "'.[label]' brings it (dcmqi)"
        )
    environment.setdefault(_FILTER, json.dumps({"Modality": modality}))
    logger.info("series served from %s: those with %s", studies, environment[_FILTER])
    return environment


def _find_series(address: str) -> None:
    """Ask a DICOMweb server for a series.

    Raises:
        ConnectionError: as for `_settings_of`.
    """
    prefix = os.environ.get("MONAI_LABEL_QIDO_PREFIX")
    search = "/".join(filter(None, [address.rstrip("/"), prefix, "series?limit=1"]))
    request = urllib.request.Request(search, headers={"Accept": "application/dicom+json"})
    try:
        urllib.request.urlopen(request, timeout=_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise ConnectionError(
                f"{search} answers {error.code} {error.reason}: expected --studies to be the root of a DICOMweb "
                "server, for Orthanc http://HOST:8042/dicom-web"
            ) from None
        logger.info("%s asks for a login: MONAI Label takes it from %s", address, _LOGIN)
    except OSError as error:
        raise ConnectionError(
            f"nobody answers at {search} ({getattr(error, 'reason', error)}): start the DICOMweb server, or correct "
            "--studies"
        ) from None


if __name__ == "__main__":
    fire.Fire(serve)
