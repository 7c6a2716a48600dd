"""What a request to the server may contain, and who may ask; without MONAI Label."""

import base64
import json

import pytest

from serving.__main__ import serve
from serving.requests import (
    FOR_INFERENCE,
    FOR_TRAINING,
    RefusalError,
    check_origins,
    check_settings,
    ending_of,
    is_authorized,
    is_below,
    is_dicomweb_query,
    is_uid,
    own_hosts,
    parse_info,
    parse_object,
    plain_name,
    refuse_page,
)

OFFERED = FOR_TRAINING | {
    "device": ["cpu", "cuda"],
    "pretrained": True,
    "max_epochs": 50,
    "val_split": 0.2,
    "model_filename": ["model.pt"],
}
CODE = "$__import__('os').system('touch pwned')"
PATHS = (
    "../../escaped",
    "/etc/passwd",
    "..",
    ".hidden",
    "a/b",
    "..\\..\\x",
    "C:\\x",
    "a\0b",
    "a\nb",
    "x" * 300,
    "é" * 120,
    "%2e%2e%2fx",
    "$x",
    "@x",
    "%x",
    "~root",
    "",
    " ",
    "a..b",
    "a.",
    "a.nii.gz.b",
)


def test_what_the_server_offers_is_accepted_as_clients_send_it_back():
    back = {name: value[0] if isinstance(value, list) else value for name, value in OFFERED.items()}
    assert check_settings(back, OFFERED) == {
        "device": "cpu",
        "multi_gpu": True,
        "gpus": "all",
        "pretrained": True,
        "max_epochs": 50,
        "val_split": 0.2,
        "model_filename": "model.pt",
    }
    assert "device" not in check_settings(OFFERED, OFFERED)  # whole lists
    assert check_settings({"run_id": "", "tracking_uri": "", "client_id": None}, OFFERED) == {}
    assert check_settings({"max_epochs": 2.0, "val_split": 0, "pretrained": 0}, OFFERED) == {
        "max_epochs": 2,
        "val_split": 0.0,
        "pretrained": False,
    }


@pytest.mark.parametrize("name", OFFERED)
@pytest.mark.parametrize("value", [CODE, "@network", "%/etc/passwd", "../x", [CODE], {"_target_": "os.system"}])
def test_no_setting_takes_code_paths_or_objects(name, value):
    with pytest.raises(RefusalError, match=name):
        check_settings({name: value}, OFFERED)


@pytest.mark.parametrize("name", FOR_INFERENCE)
@pytest.mark.parametrize("value", [CODE, "@network", "%/etc/passwd", "/etc/passwd", [CODE], [{"name": CODE}]])
def test_no_setting_of_an_inference_does_either(name, value):
    with pytest.raises(RefusalError):
        check_settings({name: value}, FOR_INFERENCE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_epochs", 0),
        ("max_epochs", 1e9),
        ("max_epochs", 1.5),
        ("max_epochs", True),
        ("max_epochs", float("nan")),
        ("val_split", -1),
        ("val_split", 1),
        ("val_split", float("inf")),
        ("pretrained", 2),
        ("gpus", "0;1"),
        ("run_id", "initialize"),
        ("tracking", "mlflow"),
        ("tracking_uri", "file:///tmp/x"),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(RefusalError, match=f"^{name} "):
        check_settings({name: value}, OFFERED)


@pytest.mark.parametrize("name", ["model", "image", "label", "bundle_path", "train#dataset#data", "force_multi_gpu"])
def test_settings_that_are_not_offered_are_refused(name):
    with pytest.raises(RefusalError, match=f"no setting '{name}'"):
        check_settings({name: 1}, OFFERED)


def test_plain_names_are_those_of_files_below_the_studies():
    for name in ("patient001_frame01", "Series 3 (late)", "a-b.c", "1", "é"):
        assert plain_name(name) == name
    for name in PATHS:
        with pytest.raises(RefusalError, match="the name is not plain"):
            plain_name(name)


def test_sent_files_keep_nothing_but_a_known_ending():
    assert ending_of("../../x.NII.GZ") == ".nii.gz"
    assert ending_of(None) == ".nii.gz"
    assert ending_of("label.bin", also=[".bin"]) == ".bin"
    for name in ("x", "x.json", "x.py", "x.pt", "x.nii.gz/..", "x.bin"):
        with pytest.raises(RefusalError, match="expected it to end in"):
            ending_of(name)


def test_links_that_lead_out_of_a_folder_are_not_below_it(tmp_path):
    folder, outside = tmp_path / "studies", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("secret")
    (folder / "out").symlink_to(outside)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "in").symlink_to(folder / "file")
    assert [is_below(folder / name, folder) for name in ("file", "in", "out", "../outside", "a\0b")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_notes_are_json_without_code_and_without_what_the_server_notes():
    assert parse_info('{"comment": "costs 5 $", "label_info": [{"name": "RV", "other": 1}]}') == {
        "comment": "costs 5 $",
        "label_info": [{"name": "RV"}],
    }
    for text in ("[]", "{", "[" * 50_000, json.dumps({"a": "x" * 70_000}), '{"a": NaN}'):
        with pytest.raises(RefusalError, match="expected a JSON object"):
            parse_object(text)
    for given in ({"a": {"b": [CODE]}}, {"$a": 1}, {"label_info": [{"name": "@x"}]}):
        with pytest.raises(RefusalError, match="a text begins with"):
            parse_info(json.dumps(given))
    with pytest.raises(RefusalError, match="the server itself notes path"):
        parse_info('{"path": "/etc"}')
    for segments in ("RV", ["RV"], [{"name": 1}], [{"name": "x" * 200}], [{"color": [1, 2, 999]}], [{"name": "a\0"}]):
        with pytest.raises(RefusalError, match="label_info"):
            parse_info(json.dumps({"label_info": segments}))


def test_queries_stay_below_the_root_of_the_dicomweb_server():
    assert is_uid("1.2.840.10008")
    assert not any(is_uid(name) for name in ("../1", "1..2", "", "1" * 65, "1.2/3"))
    assert is_dicomweb_query("studies")
    assert is_dicomweb_query("studies/1.2/series/3.4/instances/5.6/frames/1,2")
    for path in ("system", "../system", "studies/../../tools", "studies/%2e%2e", "studies//x", "studies?a=1", ""):
        assert not is_dicomweb_query(path), path


@pytest.mark.parametrize(
    ("host", "origin", "is_own"),
    [
        ("127.0.0.1:8000", None, True),
        ("localhost:8000", "http://localhost:8000", True),
        ("[::1]:8000", "http://[::1]:8000", True),
        ("127.0.0.1:8000", "https://viewer.example", True),
        ("viewer.example", "https://viewer.example", True),  # a proxy before the server
        ("127.0.0.1:8000", "http://evil.example", False),
        ("127.0.0.1:8000", "http://127.0.0.1:9000", False),
        ("127.0.0.1:8000", "null", False),
        ("evil.example:8000", "http://evil.example:8000", False),  # a name that is pointed at this machine
        ("evil.example", None, False),
        ("", None, False),
        ("[", None, False),
    ],
)
def test_pages_of_other_sites_are_refused(host, origin, is_own):
    origins = check_origins(["https://viewer.example/"])
    assert (refuse_page(host, origin, own_hosts("127.0.0.1", origins), origins) is None) is is_own


def test_a_server_for_other_machines_takes_any_name_but_no_other_page():
    hosts = own_hosts("0.0.0.0", [])
    assert refuse_page("ward-3:8000", "http://ward-3:8000", hosts, []) is None
    assert refuse_page("ward-3:8000", "http://evil.example", hosts, []) is not None


def test_the_token_is_taken_as_bearer_and_as_password():
    token = "0123456789abcdef"
    basic = base64.b64encode(f"anybody:{token}".encode()).decode()
    assert is_authorized(f"Bearer {token}", token)
    assert is_authorized(f"Basic {basic}", token)
    for header in (
        "",
        "Bearer",
        "Bearer x",
        f"Basic {token}",
        "Basic !",
        f"Digest {token}",
        f"Bearer {token} ",
        "Bearer é",
    ):
        assert not is_authorized(header, token), header


@pytest.fixture
def started(monkeypatch, tmp_path):
    """A function that starts the server as far as its process, and returns the environment of that."""
    seen: dict = {}
    monkeypatch.setattr("serving.__main__.os.execve", lambda *given: seen.update(given[2]))
    monkeypatch.setattr("serving.__main__.assemble_app", lambda app_dir, bundles: (app_dir, bundles))
    for name in ("SERVING_TOKEN", "MONAI_LABEL_AUTH_ENABLE"):
        monkeypatch.delenv(name, raising=False)

    def start(**options) -> dict:
        seen.clear()
        serve(str(tmp_path), str(tmp_path / "app"), **options)
        return seen

    return start


def test_other_machines_are_served_with_a_login_only(started, monkeypatch):
    for host in ("127.0.0.1", "localhost", "::1"):
        assert started(host=host)["SERVING_HOST"] == host
    for host in ("0.0.0.0", "::", "192.168.1.7", "ward-3", ""):
        with pytest.raises(SystemExit, match="set a token in SERVING_TOKEN"):
            started(host=host)
    assert started(host="0.0.0.0", insecure=True)
    monkeypatch.setenv("SERVING_TOKEN", "short")
    with pytest.raises(SystemExit, match="at least 16 characters"):
        started(host="0.0.0.0")
    monkeypatch.setenv("SERVING_TOKEN", "0123456789abcdef")
    assert started(host="0.0.0.0")
    monkeypatch.setenv("MONAI_LABEL_AUTH_ENABLE", "true")
    with pytest.raises(SystemExit, match="received both"):
        started()
    monkeypatch.delenv("SERVING_TOKEN")
    assert started(host="0.0.0.0")


def test_origins_are_addresses_of_pages(started):
    assert started(origins="http://a:3000,https://b/")["SERVING_ORIGINS"] == "http://a:3000,https://b"
    assert started()["SERVING_ORIGINS"] == ""
    for origin in ("*", "viewer.example", "http://a/path", "file:///x", "http://"):
        with pytest.raises(SystemExit, match="is no origin"):
            started(origins=origin)
