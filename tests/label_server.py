"""MONAI Label's server as the README starts it, and a client of it."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import REPOSITORY


class Client:
    def __init__(self, port: int, token: str | None = None) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        kind: str = "application/json",
        seconds: float = 600,
        **query,
    ) -> bytes:
        url = f"{self.address}{path}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, data=body, method=method, headers=self.headers | {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return answer.read()

    def send(self, method: str, path: str, field: str, file: Path, **query) -> bytes:
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="{field}"; filename="{file.name}"\r\n\r\n'
        body = head.encode() + file.read_bytes() + f"\r\n--{mark}--\r\n".encode()
        return self.ask(method, path, body, f"multipart/form-data; boundary={mark}", **query)

    def post(self, path: str, settings: dict, **query) -> dict:
        return json.loads(self.ask("POST", path, json.dumps(settings).encode(), **query))

    def form(self, path: str, params: dict, **query) -> bytes:
        body = urllib.parse.urlencode({"params": json.dumps(params)}).encode()
        return self.ask("POST", path, body, "application/x-www-form-urlencoded", **query)

    def offered(self, trainer: str) -> dict:
        """The settings that the server lists for a training, as Slicer sends them back: of choices the first."""
        config = json.loads(self.ask("GET", "/info/"))["trainers"][trainer]["config"]
        return {name: value[0] if isinstance(value, list) else value for name, value in config.items()}

    def refusal(self, method: str, path: str, *arguments, **query) -> tuple[int, str]:
        """The status and the sentence of an answer that is an error; with a file, of a form."""
        send = self.send if arguments else self.ask
        try:
            send(method, path, *arguments, **query)
        except urllib.error.HTTPError as error:
            said = error.read().decode()
            return error.code, json.loads(said)["detail"] if said.startswith("{") else said
        raise AssertionError(f"{method} {path} is answered as if all was well")


@contextmanager
def served(
    python: str, folder: Path, studies: str | Path, *options: str, token: str | None = None, **environment: str
) -> Iterator[Client]:
    """A client of a server that runs meanwhile, its app and log below a folder; TERM ends it, and all it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = ("--studies", str(studies), "--app_dir", str(folder / "app"), "--port", str(port))
    client = Client(port, token or environment.get("SERVING_TOKEN"))
    with (folder / "log.txt").open("w") as log:
        command = [python, "-m", "serving", *places, *options]
        variables = {**os.environ, **environment}
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=variables, stdout=log, stderr=log, start_new_session=True
        )
        try:
            for _ in range(300):
                assert process.poll() is None, (folder / "log.txt").read_text()
                try:
                    client.ask("GET", "/info/")
                    break
                except urllib.error.URLError:
                    time.sleep(1)
            else:
                raise AssertionError(f"the server is not up: {(folder / 'log.txt').read_text()}")
            yield client
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            finally:
                left = processes_of(process.pid)
                if left:
                    os.killpg(process.pid, signal.SIGKILL)
        assert not left, left


def processes_of(session: int) -> dict[int, str]:
    """The command lines of the processes that a session has, by their numbers."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(of_session) == session and state != "Z":
                found[int(stat.parent.name)] = stat.with_name("cmdline").read_text().replace("\0", " ")
        except FileNotFoundError:  # it has ended meanwhile
            continue
    return found
