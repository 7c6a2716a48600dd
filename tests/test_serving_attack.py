"""A stranger's requests to MONAI Label's server: they write and read nothing outside the studies and run nothing."""

import http.client
import http.server
import json
import subprocess
import threading
import urllib.error
import urllib.parse
from pathlib import Path

import pytest
from label_server import Client, served
from test_serving_requests import CODE, PATHS

from components.data.acdc import list_patients
from components.phantom.dataset import write_phantom_dataset

FORM = "application/x-www-form-urlencoded"
SECRET = b"stranger: this is not for them"
TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> dict[str, str]:
    root = write_phantom_dataset(str(tmp_path_factory.mktemp("data") / "phantoms"), patients=1, size_hw_d=(96, 96, 6))
    return next(iter(list_patients(root).values()))[0]


@pytest.fixture(scope="module")
def attacked(label_python, case, tmp_path_factory):
    """A client, the folder of the studies, and a folder beside them that no request may change or read."""
    folder = tmp_path_factory.mktemp("attacked")
    studies, outside = folder / "studies", folder / "outside"
    studies.mkdir()
    outside.mkdir()
    (outside / "secret.nii.gz").write_bytes(SECRET)
    (studies / "heart.nii.gz").write_bytes(Path(case["image"]).read_bytes())
    (studies / "link.nii.gz").symlink_to(outside / "secret.nii.gz")
    (studies / "dangling.nii.gz").symlink_to(outside / "new.nii.gz")
    (studies / "labels").mkdir()
    (studies / "labels/linked").symlink_to(outside)
    (studies / "labels/draft").mkdir()
    (studies / "labels/draft/heart.nii.gz").symlink_to(outside / "new.nii.gz")
    before = content_of(folder)
    environment = {"MONAI_LABEL_SESSION_PATH": str(folder / "sessions")}
    with served(label_python, folder, studies, "--bundle", "linearhead_acdc", **environment) as client:
        yield client, studies, outside
        after = content_of(folder)
    assert {path: after.get(path) for path in before} == before
    new = {Path(path).parts[0] for path in after.keys() - before.keys()}
    assert new <= {"app", "log.txt", "sessions", "studies"}


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but those that the server itself keeps."""
    own = ("app/", "log.txt", "sessions/", "studies/datastore_v2.json", "studies/.lock")
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(own)}


def stored(client: Client) -> dict:
    return json.loads(client.ask("GET", "/datastore/", output="all"))["objects"]


def form(client: Client, path: str, fields: dict, method: str = "POST", **query) -> tuple[int, str]:
    """The refusal of a form without files."""
    try:
        client.ask(method, path, urllib.parse.urlencode(fields).encode(), FORM, **query)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    raise AssertionError(f"{path} takes {fields}")


def raw(client: Client, method: str, target: str, **headers: str) -> tuple[int, bytes]:
    """The answer to a target that is sent as it is written."""
    connection = http.client.HTTPConnection(client.address.removeprefix("http://"))
    connection.request(method, target, headers={name.capitalize(): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.mark.slow
def test_images_are_stored_under_new_plain_names_only(attacked, case, tmp_path):
    client, studies, _ = attacked
    good = tmp_path / "good.nii.gz"
    good.write_bytes(Path(case["image"]).read_bytes())
    heart = (studies / "heart.nii.gz").read_bytes()
    for route in ("/datastore/", "/datastore/image"):
        for name in [*PATHS, str(studies / "x"), "dangling", "link", "heart"]:
            if name:
                assert client.refusal("PUT", route, "file", good, image=name)[0] == 422, name
    for name in ("datastore_v2.json", "x.py", "x.pt", "x.nii.gz.exe", "noending"):
        (tmp_path / name).write_bytes(good.read_bytes())
        assert client.refusal("PUT", "/datastore/", "file", tmp_path / name, image="new")[0] == 422, name
    for content in (SECRET, b"", good.read_bytes()[:2000]):
        (tmp_path / "junk.nii.gz").write_bytes(content)
        status, said = client.refusal("PUT", "/datastore/", "file", tmp_path / "junk.nii.gz", image="new")
        assert (status, "strange" in said, "tmp" in said) == (422, False, False)
    assert (studies / "heart.nii.gz").read_bytes() == heart
    assert json.loads(client.send("PUT", "/datastore/", "file", good, image="new"))["image"] == "new"
    assert client.refusal("PUT", "/datastore/", "file", good, image="new")[0] == 422
    client.ask("DELETE", "/datastore/image", id="new")
    assert not (studies / "new.nii.gz").exists()


@pytest.mark.slow
def test_labels_are_stored_for_known_images_and_plain_tags_only(attacked, case, tmp_path):
    client, studies, outside = attacked
    label = tmp_path / "label.nii.gz"
    label.write_bytes(Path(case["label"]).read_bytes())
    for tag in [*PATHS, str(outside), "linked", "draft"]:
        if tag:
            assert client.refusal("PUT", "/datastore/label", "label", label, image="heart", tag=tag)[0] == 422, tag
            for method, query in (("GET", "label"), ("DELETE", "id"), ("HEAD", "image")):
                with pytest.raises(urllib.error.HTTPError, match="HTTP Error 4"):
                    client.ask(method, "/datastore/label", **{query: "heart", "tag": tag})
            for route in ("/datastore/updatelabelinfo", "/datastore/label/info"):
                assert form(client, route, {"params": "{}"}, "PUT", label="heart", tag=tag)[0] in (404, 422)
    for name in [*PATHS, "nobody"]:
        assert client.refusal("PUT", "/datastore/label", "label", label, image=name)[0] in (404, 422), name
    for notes in ('{"a": "$x"}', '{"path": "/etc"}', "[", "[]"):
        assert form(client, "/datastore/image/info", {"info": notes}, "PUT", image="heart")[0] == 422
    assert not (studies / "labels/final/heart.nii.gz").exists()


@pytest.mark.slow
def test_images_are_read_by_known_names_only(attacked):
    client, studies, outside = attacked
    (studies / "folder").symlink_to(outside)
    names = [*PATHS, "nobody", "heart.nii.gz", "README.md", "./heart", "link", "folder/secret", "x" * 5000]
    for name in [
        *names,
        str(studies / "heart.nii.gz"),
        str(outside / "secret.nii.gz"),
        f"file://{outside}/secret.nii.gz",
    ]:
        status, said = client.refusal("POST", "/infer/linearhead_acdc", image=name, output="image")
        assert (status in (404, 422), "strange" in said) == (True, False), name
        assert client.refusal("GET", "/datastore/image", image=name)[0] in (404, 422), name
        assert client.refusal("GET", "/datastore/image/info", image=name)[0] in (404, 422), name
        assert client.refusal("DELETE", "/datastore/image", id=name)[0] in (404, 422), name
        assert client.refusal("POST", "/infer/linearhead_acdc", session_id=name or "..", output="image")[0] in (
            404,
            422,
        )
    (studies / "folder").unlink()


@pytest.mark.slow
def test_settings_are_never_evaluated(attacked, case):
    client, _, outside = attacked
    code = f"$__import__('pathlib').Path('{outside}/pwned').touch()"
    label = Path(case["label"])
    client.send("PUT", "/datastore/label", "label", label, image="heart", tag="final")
    fields = [
        *client.offered("linearhead_acdc"),
        "run_id",
        "tracking",
        "tracking_uri",
        "gpus",
        "multi_gpu",
        "client_id",
    ]
    others = ["bundle_path", "model", "image", "images", "train#trainer#max_epochs", "force_multi_gpu", "local_rank"]
    for value in (code, CODE, "@network", "%/etc/passwd", "/etc/passwd", "../x", [code], {"_target_": "os.system"}):
        for name in fields + others:
            body = json.dumps({name: value}).encode()
            with pytest.raises(urllib.error.HTTPError, match="HTTP Error 422"):
                client.ask("POST", "/train/linearhead_acdc", body, run_sync="true")
    for value in (code, "/etc/passwd", "../x"):
        for name in (
            "image",
            "label",
            "model",
            "model_filename",
            "device",
            "result_extension",
            "result_dtype",
            "logging",
        ):
            params = json.dumps({name: value})
            assert form(client, "/infer/linearhead_acdc", {"params": params}, image="heart")[0] == 422, name
            with pytest.raises(urllib.error.HTTPError, match="HTTP Error 422"):
                client.ask("POST", "/batch/infer/linearhead_acdc", params.encode())
            with pytest.raises(urllib.error.HTTPError, match="HTTP Error 422"):
                client.ask("POST", "/activelearning/first", params.encode())
        with pytest.raises(urllib.error.HTTPError, match="HTTP Error 422"):
            client.ask("POST", "/train/", json.dumps({"linearhead_acdc": {"max_epochs": value}}).encode())
        with pytest.raises(urllib.error.HTTPError, match="HTTP Error 422"):
            client.ask("POST", "/train/", json.dumps({value: {}}).encode())
    with pytest.raises(urllib.error.HTTPError, match="HTTP Error 404"):
        client.ask("GET", "/train/")  # none has begun
    client.ask("DELETE", "/datastore/label", id="heart", tag="final")
    assert "final" not in stored(client)["heart"]["labels"]


@pytest.mark.slow
def test_sessions_are_of_what_the_server_has_stored(attacked, case, tmp_path):
    client, _, _ = attacked
    image = tmp_path / "meta.info.nii.gz"
    image.write_bytes(Path(case["image"]).read_bytes())
    assert client.refusal("PUT", "/session/", "files", image, uncompress="true")[0] == 422
    (tmp_path / "junk.nii.gz").write_bytes(SECRET)
    status, said = client.refusal("PUT", "/session/", "files", tmp_path / "junk.nii.gz")
    assert (status, "strange" in said) == (422, False)
    session = json.loads(client.send("PUT", "/session/", "files", image))["session_id"]
    assert client.ask("GET", f"/session/{session}", image="true") == image.read_bytes()
    client.ask("POST", "/infer/linearhead_acdc", session_id=session, output="json")
    client.ask("DELETE", f"/session/{session}")
    assert client.refusal("POST", "/infer/linearhead_acdc", session_id=session)[0] == 404
    for target in (
        "/session/..",
        "/session/%2e%2e",
        f"/session/..%2f{session}",
        "/session/%00",
        f"/session/{'x' * 5000}",
    ):
        for method in ("GET", "DELETE"):
            assert raw(client, method, target)[0] in (404, 422), target


@pytest.mark.slow
def test_no_route_leads_elsewhere(attacked):
    client, _, _ = attacked
    for target in (
        "/logs/",
        "/logs/gpu",
        "/model/linearhead_acdc",
        "/model/info/linearhead_acdc",
        "/scoring/",
        "/proxy/dicom/wado/studies",
        "/proxy/dicom/..%2fsystem",
        "/static/ohif/index.html",
        "/static/..%2fapp.py",
        "/openapi.json",
        "/docs",
        "/",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/activelearning/..%2fx",
    ):
        assert raw(client, "GET", target)[0] in (404, 405, 422), target
    for target in (
        "/reload",
        "/scoring/dice",
        "/infer/wsi/linearhead_acdc",
        "/infer/wsi_v2/linearhead_acdc",
        "/infer/..%2flinearhead_acdc?image=heart",
        "/infer/%2e%2e?image=heart",
        "/train/..",
        "/proxy/dicom/stow/studies",
        "/proxy/dicom/qido/studies",
    ):
        assert raw(client, "POST", target)[0] in (404, 405, 422), target
    assert raw(client, "PUT", "/model/linearhead_acdc")[0] == 404
    page = raw(client, "GET", "/ohif/")
    assert (page[0], b"OHIF" in page[1]) == (200, True)
    for target in ("/ohif/..%2f..%2f..%2fapp.py", "/ohif/%2fetc%2fpasswd", "/ohif/a%00b", "/ohif/..", "/ohif/assets"):
        assert raw(client, "GET", target)[1] == page[1], target


@pytest.mark.slow
def test_pages_of_other_sites_are_not_answered(attacked):
    client, _, _ = attacked
    own = client.address.removeprefix("http://")
    assert raw(client, "GET", "/info/", origin=client.address)[0] == 200
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"host": "evil.example"}):
        assert raw(client, "POST", "/train/linearhead_acdc", **({"host": own} | headers))[0] == 403
    connection = http.client.HTTPConnection(own)
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    connection.request("OPTIONS", "/train/linearhead_acdc", headers=asked)
    answer = connection.getresponse()
    assert answer.status == 400
    assert answer.getheader("Access-Control-Allow-Origin") is None


@pytest.mark.slow
def test_with_a_token_nobody_else_is_answered(label_python, case, tmp_path):
    studies = tmp_path / "studies"
    studies.mkdir()
    (studies / "heart.nii.gz").write_bytes(Path(case["image"]).read_bytes())
    options = ("--bundle", "linearhead_acdc", "--host", "0.0.0.0", "--origins", "https://viewer.example")
    with served(label_python, tmp_path, studies, *options, SERVING_TOKEN=TOKEN) as client:
        for target in ("/info/", "/ohif/", "/datastore/", "/auth/token/valid", "/nothing"):
            assert raw(client, "GET", target)[0] == 401, target
            assert raw(client, "GET", target, authorization="Bearer wrong")[0] == 401
        assert json.loads(raw(client, "GET", "/auth/")[1])["enabled"] is True
        stranger = Client(0)
        stranger.address = client.address
        assert form(stranger, "/auth/token", {"username": "a", "password": "wrong"})[0] == 401
        given = urllib.parse.urlencode({"username": "a", "password": TOKEN}).encode()
        assert json.loads(stranger.ask("POST", "/auth/token", given, FORM))["access_token"] == TOKEN
        client.ask("GET", "/auth/token/valid")
        client.ask("POST", "/infer/linearhead_acdc", image="heart", output="json")
        connection = http.client.HTTPConnection(client.address.removeprefix("http://"))
        asked = {"Origin": "https://viewer.example", "Access-Control-Request-Method": "POST"}
        connection.request("OPTIONS", "/train/linearhead_acdc", headers=asked)
        answer = connection.getresponse()
        assert answer.getheader("Access-Control-Allow-Origin") == "https://viewer.example"


REALM = """
import json, sys, jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives import serialization as form
def token(key, *roles):
    claims = {"preferred_username": "a", "email": "a@b", "name": "A", "realm_access": {"roles": list(roles)}}
    return jwt.encode(claims, key, "RS256")
key, other = (rsa.generate_private_key(65537, 2048) for _ in range(2))
public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo).decode()
public = "".join(public.splitlines()[1:-1])
user = token(key, "monailabel-user")
print(json.dumps({"public_key": public, "user": user, "forged": token(other, "monailabel-user"), "nobody": token(key)}))
"""


@pytest.mark.slow
def test_with_monai_labels_login_roles_are_told_apart(label_python, case, tmp_path):
    realm = json.loads(subprocess.run([label_python, "-c", REALM], check=True, capture_output=True).stdout)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"public_key": realm["public_key"]}).encode())

        def log_message(self, *_: object) -> None: ...

    keycloak = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=keycloak.serve_forever, daemon=True).start()
    studies = tmp_path / "studies"
    studies.mkdir()
    (studies / "heart.nii.gz").write_bytes(Path(case["image"]).read_bytes())
    environment = {
        "MONAI_LABEL_AUTH_ENABLE": "true",
        "MONAI_LABEL_AUTH_REALM_URI": f"http://127.0.0.1:{keycloak.server_port}",
    }
    options = ("--bundle", "linearhead_acdc", "--host", "0.0.0.0")
    try:
        with served(label_python, tmp_path, studies, *options, token=realm["user"], **environment) as client:
            assert raw(client, "GET", "/info/")[0] == 401
            assert raw(client, "GET", "/info/", authorization=f"Bearer {realm['forged']}")[0] == 401
            assert raw(client, "GET", "/info/", authorization=f"Bearer {realm['nobody']}")[0] == 403
            assert client.refusal("POST", "/train/linearhead_acdc")[0] == 403
            assert client.refusal("DELETE", "/datastore/image", id="heart")[0] == 403
    finally:
        keycloak.shutdown()
        keycloak.server_close()
