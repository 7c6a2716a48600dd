"""Serve the bundles to 3D Slicer, OHIF or any client of MONAI Label.

From the repository's root: `python -m serving --studies DIR`, in an environment of its own with the packages of
`constraints-label.txt`. `--bundle FOLDER` serves a trained bundle that `autosam new` has made.
Other machines are served only with a login, whose token is in the variable `SERVING_TOKEN`, or with `--insecure`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from autosam.options import command_line
from release.bundles import PACKED
from serving.app import assemble_app
from serving.requests import check_origins, is_loopback

_FILTER = "MONAI_LABEL_DICOMWEB_SEARCH_FILTER"
_LOGIN = "MONAI_LABEL_DICOMWEB_USERNAME and MONAI_LABEL_DICOMWEB_PASSWORD"
_SECONDS = 10
_SHORTEST_TOKEN = 16

logger = logging.getLogger("serving")


def serve(
    studies: str,
    app_dir: str = "monailabel_app",
    bundle: str = ",".join(PACKED),
    modality: str = "MR",
    host: str = "127.0.0.1",
    port: int = 8000,
    origins: str = "",
    insecure: bool = False,
) -> None:
    """Assemble the app and replace this process by MONAI Label's server.

    Args:
        studies: folder of the volumes to label, or a DICOMweb address.
        app_dir: folder of the app, made if missing; trained models stay in it.
        bundle: bundles to serve, separated by commas: names, or folders of bundles for a user's own data.
        modality: modality of the series that are served from a DICOMweb address, unless the environment has MONAI
            Label's variable `MONAI_LABEL_DICOMWEB_SEARCH_FILTER`.
        host: address to listen at; `0.0.0.0` for every address of this machine.
        port: port to listen at.
        origins: addresses of other pages whose scripts may use the server, separated by commas.
        insecure: whether to serve other machines without a login.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = _access_of(host, origins.split(","), insecure)
        environment = _settings_of(str(studies), modality) | settings
        app, names = assemble_app(Path(app_dir).resolve(), bundle.split(","))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(app), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--uvicorn_app", "serving.server:app"]
    places = ["--app", str(app), "--studies", str(studies), "--host", host, "--port", str(port)]
    sys.stdout.flush()
    os.execve(sys.executable, [*command, *places, "--conf", "models", ",".join(names)], environment)


def _access_of(host: str, origins: Sequence[str], insecure: bool) -> dict[str, str]:
    """Return the variables by which the server learns who may use it.

    Raises:
        ValueError: if other machines would be served without a login, or an origin or the token is unusable.
    """
    token = os.environ.get("SERVING_TOKEN", "")
    if token and (len(token) < _SHORTEST_TOKEN or not token.isascii()):
        raise ValueError(
            f"the token in SERVING_TOKEN is too short or not ASCII: expected at least {_SHORTEST_TOKEN} characters, as "
            "of openssl rand -hex 16"
        )
    has_keycloak = os.environ.get("MONAI_LABEL_AUTH_ENABLE", "").lower() in ("1", "true", "t", "yes", "y", "on")
    if token and has_keycloak:
        raise ValueError("expected SERVING_TOKEN or MONAI_LABEL_AUTH_ENABLE, received both: unset one")
    if not (is_loopback(host) or token or has_keycloak or insecure):
        raise ValueError(
            f"--host {host} serves other machines, and anybody there could read, write and train: set a token in "
            "SERVING_TOKEN, or MONAI_LABEL_AUTH_ENABLE, or give --insecure in a network that you trust"
        )
    return {"SERVING_HOST": host, "SERVING_ORIGINS": ",".join(check_origins(origins))}


def _settings_of(studies: str, modality: str) -> dict[str, str]:
    """Return the environment that MONAI Label needs for its studies, after checking that they exist.

    Raises:
        FileNotFoundError: if the folder, or a program that DICOM SEG needs, is missing.
        ConnectionError: if no server answers at a DICOMweb address, or it is not a DICOMweb server.
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
            "the program itkimage2segimage, which writes DICOM SEG, is missing: install it with pip install -c "
            "constraints-label.txt dcmqi"
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
            f"no server answers at {search} ({getattr(error, 'reason', error)}): start the DICOMweb server, or correct "
            "--studies"
        ) from None


if __name__ == "__main__":
    command_line(__doc__, serve)()
