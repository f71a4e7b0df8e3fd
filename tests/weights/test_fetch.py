"""Names become folders: local ones, the embedded one, and what a small hub on the loopback has."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.hub.server import COMMIT, SHARE, Fault, serving
from weitiao.errors import InputError, RunError
from weitiao.models import tiny
from weitiao.weights import arrivals, cache, fetch, inspect, sources

HEADER = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
ONE_TENSOR = len(HEADER).to_bytes(8, "little") + HEADER + b"x"
BIG = bytes(range(256)) * 20_000  # 5.1 MB: several parts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pickles(model, tmp_path_factory):
    """The same model as a repository of old: two .bin files and their index, with tied weights."""
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("pickles")
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    tensors["tied.weight"] = tensors[names[0]]
    first, second = (f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2))
    shards = {first: [*names[:3], "tied.weight"], second: names[3:]}
    for file, held in shards.items():
        torch.save({name: tensors[name] for name in held}, folder / file)
    places = {name: file for file, held in shards.items() for name in held}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder, tensors


@pytest.fixture
def hub(model, pickles):
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    more = {"modeling.py": b"open('x')", "onnx/model.json": b"{}", "pytorch_model.bin": b"PK"}
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": ONE_TENSOR}
    share = {"ice_text.model": b"ice", "parts/pytorch_model.bin": b"part", "parts/deep/x.txt": b"x"}
    repositories = {
        "org/tiny": {**files, **more},
        "org/other": {"config.json": b"{}", "model.ckpt": b"PK"},
        "org/bad": {"config.json": b"{}", "pytorch_model.bin": b"PK"},
        "org/pickles": {path.name: path.read_bytes() for path in pickles[0].iterdir()},
        "org/adapter": adapter,
        "org/outside": {"config.json": b"{}", "model.safetensors": ONE_TENSOR, "../../x.json": b"{}", "/y.json": b"{}"},
        "datasets/org/rows": {"train.jsonl": b"{}\n", "data/big.parquet": BIG, "load.py": b"open('x')"},
        "share": share,
        "plain": {"weights.safetensors": BIG},
    }
    with serving(repositories) as server:
        yield server


@pytest.fixture
def run(hub, tmp_path):
    """Run ``weitiao`` in a fresh process against the little hub (the client reads its variables when imported)."""

    def run(*arguments, background=False, **more):
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "HOME": str(tmp_path),
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            **more,
        }
        command = [sys.executable, "-m", "weitiao", *arguments]
        if background:
            return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


def held(folder):
    """Names below a folder, but for ours."""
    found = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith(".weitiao/")}


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
    assert cache.digest(path, git=True) == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    assert cache.digest(path) == hashlib.sha256(b"hello\n").hexdigest()


HF, MS, MIRROR = "https://huggingface.co", "https://www.modelscope.cn", "https://hf-mirror.com"


@pytest.mark.parametrize(
    ("text", "kind", "base", "name", "revision", "path"),
    [
        ("Qwen/Qwen2.5-0.5B", "hub", HF, "Qwen/Qwen2.5-0.5B", "main", ""),
        ("gpt2", "hub", HF, "gpt2", "main", ""),
        ("modelscope:Qwen/Qwen2.5-0.5B", "modelscope", MS, "Qwen/Qwen2.5-0.5B", "master", ""),
        (f"{HF}/Qwen/Qwen2.5-0.5B", "hub", HF, "Qwen/Qwen2.5-0.5B", "main", ""),
        (f"{HF}/a/b/blob/main/x%20y/c.json", "hub", HF, "a/b", "main", "x y/c.json"),
        (f"{HF}/a/b/resolve/v1/c.safetensors?download=true", "hub", HF, "a/b", "v1", "c.safetensors"),
        (f"{HF}/gpt2/resolve/main/config.json", "hub", HF, "gpt2", "main", "config.json"),
        (f"{HF}/a/b/tree/main/onnx", "hub", HF, "a/b", "main", "onnx/*"),
        (f"{MIRROR}/a/b/blob/main/c.json", "hub", MIRROR, "a/b", "main", "c.json"),
        (f"{MS}/models/a/b", "modelscope", MS, "a/b", "master", ""),
        (f"{MS}/models/a/b/file/view/v2/c.json", "modelscope", MS, "a/b", "v2", "c.json"),
        (f"{MS}/models/a/b/resolve/master/c.json", "modelscope", MS, "a/b", "master", "c.json"),
        ("https://cloud.example.edu/d/fb9f16d6dc8f482596c2/", "seafile", "https://cloud.example.edu", None, "main", ""),
        ("https://example.org/x/weights.safetensors", "file", "https://example.org", None, "main", ""),
    ],
)
def test_what_names_and_links_mean(monkeypatch, text, kind, base, name, revision, path):
    monkeypatch.setenv("HF_ENDPOINT", HF)
    monkeypatch.delenv("MODELSCOPE_DOMAIN", raising=False)
    expected = sources.Target(kind, name or text, base, revision, False, path)
    assert sources.parse(text) == expected


def test_links_to_the_hub_go_to_the_endpoint_that_was_chosen(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", MIRROR)
    assert sources.parse(f"{HF}/datasets/a/b/blob/main/c.json") == sources.Target(
        "hub", "a/b", MIRROR, "main", True, "c.json"
    )


@pytest.mark.parametrize("name", [*"../x /etc/x a/../../x a\\b C:x a//b ./a .weitiao/x a\x00b".split(" "), ""])
def test_names_that_lead_outside(name):
    assert not sources._safe(name)


def test_a_disk_that_is_too_small_is_said_first(tmp_path):
    free = arrivals.disk(tmp_path).free_bytes
    with pytest.raises(RunError, match="bytes are needed for org/tiny"):
        arrivals._check_disk("org/tiny", free * 2, tmp_path / "not" / "yet")


# ---- with one ------------------------------------------------------------------------------------------------------


def test_fetch_then_offline(run, hub, model, tmp_path):
    code, out, err = run("fetch", "org/tiny", "--json")
    assert code == 0, err
    got = json.loads(out)
    folder = Path(got["folder"])
    assert got["commit"] == COMMIT and got["downloaded_bytes"] == got["bytes"] > 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }  # no code, no pickle, no subfolder
    before = len([request for request in hub.requests if request.startswith("GET /org")])
    code, out, err = run("fetch", "org/tiny", "--json")
    assert json.loads(out)["downloaded_bytes"] == 0 and "nothing to fetch" in err
    assert len([request for request in hub.requests if request.startswith("GET /org")]) == before
    seen = len(hub.seen)
    for more in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        code, out, err = run("fetch", "org/tiny", **more)
        assert (code, out.strip()) == (0, str(folder)) and "using the cached copy" in err
    code, out, err = run("fetch", "org/tiny", "--revision", COMMIT, "--json")
    assert code == 0 and json.loads(out)["downloaded_bytes"] == 0 and len(hub.seen) == seen  # a commit does not change
    code, out, err = run("fetch", "org/tiny", "--revision", "v1", "--to", str(tmp_path / "here"))
    assert code == 0 and held(out.strip()) == held(model)


def test_other_tools_find_what_was_fetched_and_it_finds_theirs(run, hub, tmp_path, model):
    from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download

    assert run("fetch", "org/tiny")[0] == 0
    cached = tmp_path / "hf" / "hub"
    (found,) = scan_cache_dir(cached).repos
    assert found.repo_id == "org/tiny" and {r.commit_hash for r in found.revisions} == {COMMIT}
    assert held(snapshot_download("org/tiny", cache_dir=cached, local_files_only=True)) == held(model)
    for name in held(model):
        path = Path(hf_hub_download("org/tiny", name, cache_dir=cached, local_files_only=True))
        assert path.is_symlink() and path.resolve().parent.name == "blobs"
    for lock in (cached / "models--org--tiny" / ".weitiao").iterdir():
        lock.unlink()  # as another tool would have left it
    assert run("fetch", "org/tiny", HF_HUB_OFFLINE="1")[0] == 0


def test_an_adapter_is_fetched_too(run):
    code, out, err = run("fetch", "org/adapter")
    assert code == 0 and (Path(out.strip()) / "adapter_model.safetensors").is_file(), err


def test_wrong_bytes_of_the_right_size_never_get_a_name(run, hub, tmp_path):
    hub.always = Fault("flip", 1000)
    code, out, err = run("fetch", "org/tiny")
    assert code == 1 and not out and "no place gives bytes whose hash is" in err
    assert not [path for path in held(tmp_path / "hf") if "snapshots" in path or "blobs" in path]
    hub.always = None
    hub.faults.append(Fault("flip", 7))
    code, out, err = run("fetch", "org/tiny")
    assert code == 0, err


def test_a_file_that_was_changed_on_the_disk_is_fetched_anew(run, hub):
    folder = Path(run("fetch", "org/tiny")[1].strip())
    path = (folder / "model.safetensors").resolve()
    right = path.read_bytes()
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    code, out, err = run("fetch", "org/tiny", "--json")
    assert code == 0 and json.loads(out)["downloaded_bytes"] == len(right) and path.read_bytes() == right, err


def test_pickles_become_safetensors(run, hub, pickles):
    code, out, err = run("fetch", "org/pickles", "--json")
    assert code == 0 and "become safetensors" in err, err
    got = json.loads(out)
    assert set(got["files"]) == {"config.json", "model.safetensors"} == held(got["folder"])
    assert {tensor.name for tensor in inspect.headers(got["folder"])} == set(pickles[1])
    code, out, err = run("fetch", "org/pickles", "--json")
    assert code == 0 and json.loads(out)["downloaded_bytes"] == 0, err
    code, out, err = run("fetch", "org/pickles", HF_HUB_OFFLINE="1")
    assert code == 0, err


def test_patterns_and_data_sets(run):
    code, out, err = run("fetch", "org/rows", "--dataset", "--json")
    assert code == 0, err
    got = json.loads(out)
    assert "datasets--org--rows" in got["folder"] and held(got["folder"]) == {"train.jsonl", "data/big.parquet"}
    code, out, err = run("fetch", "org/tiny", "--include", "*.json", "--exclude", "onnx/*", "--json")
    assert code == 0 and json.loads(out)["files"] and all(name.endswith(".json") for name in json.loads(out)["files"])
    code, out, err = run("fetch", "org/tiny", "--include", "nothing*")
    assert code == 2 and "no file is called so" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["org/nothing"], 2, "no such repository"),
        (["org/gated"], 2, "access must be asked for"),
        (["org/tiny", "--revision", "v9"], 2, 'no revision "v9"'),
        (["org/tiny", "--revision", "../x"], 2, 'no revision "../x"'),
        (["org/other"], 2, "no safetensors"),
        (["org/bad"], 2, "pytorch_model.bin"),
        (["org/outside"], 2, "refused: a file called '../../x.json'"),
        (["org/tiny", "--mirror", "hf-mirror.com"], 2, "it begins with https://"),
        (["a/b/c"], 2, "not a name"),
    ],
)
def test_what_is_refused(run, arguments, code, said):
    got, out, err = run("fetch", *arguments)
    assert (got, out) == (code, "") and "error: " in err and said in err and "Traceback" not in err


def test_offline_without_a_copy(run, hub, tmp_path):
    code, _, err = run("fetch", "org/tiny", HF_HUB_OFFLINE="1")
    assert code == 1 and "cannot be reached" in err
    code, _, err = run("fetch", "org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 1 and "cannot be reached" in err
    code, _, err = run("fetch", f"{hub.url}/d/{SHARE}/", HF_HUB_OFFLINE="1")
    assert code == 1 and "cannot be reached" in err
    assert run("fetch", "org/tiny")[0] == 0
    code, _, err = run("fetch", "org/tiny", "--to", str(tmp_path / "x"), HF_HUB_OFFLINE="1")
    assert code == 1 and "cannot be reached" in err


# ---- other places --------------------------------------------------------------------------------------------------


def test_mirrors_serve_what_the_first_place_does_not(run, hub, tmp_path):
    hub.always = Fault("status", value=404)
    with serving(hub.repositories) as mirror, serving(hub.repositories) as scope:
        scope.repositories["org/tiny"] = {**scope.repositories["org/tiny"], "config.json": b"{ }"}  # another commit's
        more = ["--mirror", scope.url, "--mirror", mirror.url, "--to", str(tmp_path / "x"), "--json"]
        code, out, err = run("fetch", "org/tiny", *more, MODELSCOPE_DOMAIN=scope.url)
        assert code == 0, err
        for name in json.loads(out)["files"]:
            assert (tmp_path / "x" / name).read_bytes() == hub.repositories["org/tiny"][name]
        assert any("/api/v1/models/org/tiny/repo?" in request for request in scope.requests)
        assert any("/resolve/" in request for request in mirror.requests)


def test_a_hub_that_is_away_is_replaced_whole_and_that_is_said(run, hub):
    code, _, err = run("fetch", "org/tiny", "--mirror", hub.url, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 0 and "the list of files is from" in err, err


def test_modelscope(run, hub, model):
    code, out, err = run("fetch", "modelscope:org/tiny", "--json", MODELSCOPE_DOMAIN=hub.url)
    assert code == 0, err
    got = json.loads(out)
    assert held(got["folder"]) == held(model) and "models--org--tiny" in got["folder"]
    code, out, err = run("fetch", "modelscope:org/tiny", MODELSCOPE_DOMAIN=hub.url, HF_HUB_OFFLINE="1")
    assert (code, out.strip()) == (0, got["folder"]), err
    code, out, err = run("fetch", "modelscope:org/rows", "--dataset", "--json", MODELSCOPE_DOMAIN=hub.url)
    assert code == 0 and held(json.loads(out)["folder"]) == {"train.jsonl", "data/big.parquet"}, err


def test_links(run, hub, tmp_path):
    for link in (f"{hub.url}/org/tiny/blob/main/config.json", f"{hub.url}/org/tiny/resolve/v1/config.json"):
        code, out, err = run("fetch", link, "--json")
        assert code == 0 and set(json.loads(out)["files"]) == {"config.json"}, err
    elsewhere = hub.url.replace("127.0.0.1", "localhost")
    code, out, err = run("fetch", f"{elsewhere}/plain/weights.safetensors?key=very-secret", "--json")
    assert code == 0, err
    folder = Path(json.loads(out)["folder"])
    assert (folder / "weights.safetensors").read_bytes() == BIG
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"very-secret" in path.read_bytes()]
    code, out, err = run("fetch", f"{hub.url}/d/{SHARE}/", "--json")
    assert code == 0, err
    assert held(json.loads(out)["folder"]) == {"ice_text.model", "parts/pytorch_model.bin", "parts/deep/x.txt"}
    hub.faults.append(Fault("flip"))
    (Path(json.loads(out)["folder"]) / "ice_text.model").unlink()
    code, out, err = run("fetch", f"{hub.url}/d/{SHARE}/")
    assert code == 0 and (Path(out.strip()) / "ice_text.model").read_bytes() == b"ice", err  # its hash was kept


def test_files_behind_a_gate(run, hub):
    hub.always = Fault("status", value=403)
    code, _, err = run("fetch", "org/tiny")
    assert code == 2 and "access must be asked for" in err


def test_ctrl_c_keeps_what_came(run, hub):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and its children, ignore it
    hub.always = Fault("stall", 1_000_000, 60)
    started = run("fetch", "org/rows", "--dataset", "--include", "data/*", background=True)
    while hub.sent < 1_000_000 and started.poll() is None:
        time.sleep(0.02)
    time.sleep(0.5)  # what was sent is read and written
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode in (1, 130) and not out and "the same command goes on from there" in err, err
    assert "Traceback" not in err
    sent, hub.always = hub.sent, None
    code, _, err = run("fetch", "org/rows", "--dataset")
    assert code == 0 and "here from before" in err and hub.sent < len(BIG) + sent / 2, err


def test_two_processes_fetch_once(run, hub):
    hub.always = Fault("trickle", 0, 0.01)
    both = [run("fetch", "org/rows", "--dataset", "--json", background=True) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    folders = {json.loads(out)["folder"] for out, _ in said}
    assert (Path(folders.pop()) / "data" / "big.parquet").read_bytes() == BIG and not folders
    assert hub.sent <= 2 * len(BIG) + 100


def test_a_token_goes_to_its_own_host_only(run, hub):
    with serving(hub.repositories) as mirror, serving(hub.repositories) as cdn:
        hub.cdn = cdn.url
        hub.faults.append(Fault("redirect"))
        hub.always = Fault("status", value=404)
        cdn.always = Fault("every", 50_000)
        keys = {"HF_TOKEN": "hf_canary", "MODELSCOPE_API_TOKEN": "ms"}
        code, _, err = run("fetch", "org/tiny", "--mirror", mirror.url, **keys)
        assert code == 0, err
        assert {key for _, _, key in hub.seen} == {"Bearer hf_canary"}
        assert cdn.seen and mirror.seen and {key for _, _, key in (*cdn.seen, *mirror.seen)} == {""}
        code, _, err = run("fetch", "modelscope:org/tiny", MODELSCOPE_DOMAIN=mirror.url, **keys)
        assert code == 0 and {key for _, _, key in mirror.seen} == {"", "Bearer ms"}, err


def test_a_token_may_lie_in_the_keyring(monkeypatch):
    from types import SimpleNamespace

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "MODELSCOPE_DOMAIN"):
        monkeypatch.delenv(name, raising=False)
    held = {("weitiao", "huggingface.co"): "one", ("weitiao", "www.modelscope.cn"): "two"}
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setitem(sys.modules, "keyring", SimpleNamespace(get_password=lambda *of: held.get(of)))
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    found = sources.keys(("https://huggingface.co", "https://hf-mirror.com"))
    assert found["https://huggingface.co:443"] == {"Authorization": "Bearer one"}
    assert found["https://www.modelscope.cn:443"]["Authorization"] == "Bearer two" and len(found) == 2
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "three")
    assert sources.keys(())["https://www.modelscope.cn:443"]["Authorization"] == "Bearer three"
    monkeypatch.setitem(sys.modules, "keyring", SimpleNamespace(get_password=lambda *of: 1 / 0))
    assert sources.keys(()).keys() == {"https://www.modelscope.cn:443"}, "a keyring that fails holds nothing"
