"""Names become folders: local ones, the embedded one, and repositories of a small hub on the loopback."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from weitiao.errors import InputError
from weitiao.models import tiny
from weitiao.weights import fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HEADER = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
ONE_TENSOR = len(HEADER).to_bytes(8, "little") + HEADER + b"x"
LARGE = ".safetensors"  # what the hub keeps in LFS, named by sha256


def sha1_of_git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class Server(ThreadingHTTPServer):
    """What the little hub has, was asked, and does wrong."""

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Hub)
        self.repositories, self.requests, self.flip = repositories, [], False
        self.url = f"http://127.0.0.1:{self.server_port}"


class Hub(BaseHTTPRequestHandler):
    """The hub's API for the repositories of its server (name -> path -> bytes)."""

    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def as_json(self, value):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path}")
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        name = "/".join(words[2:4] if words[0] == "api" else words[:2])
        if name == "org/gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        if name not in self.server.repositories:
            return self.answer(401, X_Error_Code="RepoNotFound")
        files = self.server.repositories[name]
        what, revision, rest = (words[4], words[5], words[6:]) if words[0] == "api" else (words[2], words[3], words[4:])
        if revision not in ("main", "v1", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self.as_json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []})
        if what == "tree":
            return self.as_json([self.entry(path, data) for path, data in files.items()])
        data = files.get("/".join(rest))
        if data is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        entry = self.entry("", data, large=rest[-1].endswith(LARGE))
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        if self.server.flip and rest[-1].endswith(LARGE):
            data = data[:-1] + bytes([data[-1] ^ 1])
        return self.answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

    def entry(self, path, data, large=None):
        found = {"type": "file", "path": path, "size": len(data), "oid": sha1_of_git(data)}
        if path.endswith(LARGE) if large is None else large:
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def hub(model):
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    more = {"modeling.py": b"open('x')", "onnx/model.json": b"{}", "pytorch_model.bin": b"PK"}
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": ONE_TENSOR}
    pickles = {"config.json": b"{}", "pytorch_model.bin": b"PK"}
    server = Server({"org/tiny": {**files, **more}, "org/pickles": pickles, "org/adapter": adapter})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(hub, tmp_path):
    """Run ``weitiao`` in a fresh process against the little hub (the client reads its variables when imported)."""

    def run(*arguments, **more):
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "HOME": str(tmp_path),
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            **more,
        }
        command = [sys.executable, "-m", "weitiao", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


# ---- without a network ---------------------------------------------------------------------------------------------


def test_a_folder_is_itself(model, monkeypatch):
    assert fetch.resolve(model) == model
    monkeypatch.chdir(model.parent)
    assert fetch.resolve(model.name) == Path(model.name)


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "a/b/c", "~/nothing", "", "a b", "../x"])
def test_what_is_neither_a_folder_nor_a_name(name):
    with pytest.raises(InputError, match="no such folder"):
        fetch.resolve(name)


def test_a_file_is_no_model(model):
    with pytest.raises(InputError, match="no such folder"):
        fetch.resolve(model / "config.json")


def test_the_embedded_model_is_in_the_package():
    import weitiao

    folder = Path(weitiao.__file__).parent / "demo" / "weitiao-tiny-zh"
    if folder.is_dir():
        assert fetch.resolve("weitiao-tiny-zh") == folder
    else:
        with pytest.raises(InputError, match="embedded model is missing"):
            fetch.resolve("weitiao-tiny-zh")


def test_digests(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"hello\n")
    assert fetch.digest(path, git=True) == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    assert fetch.digest(path) == hashlib.sha256(b"hello\n").hexdigest()


# ---- with one ------------------------------------------------------------------------------------------------------


def test_fetch_then_offline(run, hub, model):
    code, out, err = run("fetch", "org/tiny", "--json")
    assert code == 0, err
    got = json.loads(out)
    folder = Path(got["folder"])
    assert got["commit"] == COMMIT and got["downloaded_bytes"] == got["bytes"] > 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }  # no code, no pickle, no subfolder
    before = len([request for request in hub.requests if request.startswith("GET /org")])
    assert json.loads(run("fetch", "org/tiny", "--json")[1])["downloaded_bytes"] == 0
    assert len([request for request in hub.requests if request.startswith("GET /org")]) == before
    for more in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        code, out, err = run("fetch", "org/tiny", **more)
        assert (code, out.strip()) == (0, str(folder)) and "using the cached copy" in err
    code, out, err = run("fetch", "org/tiny", "--revision", "v1", "--to", str(folder.parent / "here"))
    assert code == 0 and sorted(path.name for path in Path(out.strip()).iterdir() if path.is_file()) == sorted(
        path.name for path in model.iterdir()
    )


def test_an_adapter_is_fetched_too(run):
    code, out, err = run("fetch", "org/adapter")
    assert code == 0 and (Path(out.strip()) / "adapter_model.safetensors").is_file(), err


def test_wrong_bytes_of_the_right_size_are_noticed_and_removed(run, hub):
    hub.flip = True
    code, out, err = run("fetch", "org/tiny")
    assert code == 1 and not out and "model.safetensors: its bytes are not those of the hub" in err
    hub.flip = False
    code, out, err = run("fetch", "org/tiny")
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["org/nothing"], 2, "no such repository"),
        (["org/gated"], 2, "access must be asked for"),
        (["org/tiny", "--revision", "v9"], 2, 'no revision "v9"'),
        (["org/pickles"], 2, "no safetensors"),
        (["a/b/c"], 2, "not a name"),
    ],
)
def test_what_the_hub_refuses(run, arguments, code, said):
    got, out, err = run("fetch", *arguments)
    assert (got, out) == (code, "") and err.startswith("error: ") and said in err and "Traceback" not in err


def test_offline_without_a_copy(run):
    code, _, err = run("fetch", "org/tiny", HF_HUB_OFFLINE="1")
    assert code == 1 and "cannot be reached" in err
    code, _, err = run("fetch", "org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 1 and "cannot be reached" in err


def test_a_disk_that_is_too_small_is_said_first(monkeypatch, tmp_path):
    from weitiao.errors import RunError

    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(RunError, match="bytes are needed for org/tiny"):
        fetch._check_disk("org/tiny", free * 2, tmp_path / "not" / "yet")
