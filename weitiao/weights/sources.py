"""Where files come from: what a name or a pasted link means, which files are there, and each one's address anywhere.

    target = parse("Qwen/Qwen2.5-0.5B")                      # or "modelscope:Qwen/Qwen2.5-0.5B", or a link
    listing = listed(web, target, target.base)               # names, sizes and hashes at one commit
    address(target, listing, entry, "https://hf-mirror.com") # the same file on a mirror

Four kinds of places are known: the Hugging Face hub and what speaks its API, ModelScope, a share of a Seafile server,
and the address of a single file. What a place says is not believed: names, sizes and hashes are checked here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urljoin, urlsplit, urlunsplit

from weitiao.errors import InputError, first_of, t
from weitiao.weights.web import Fault, Web, bare, origin, shown

REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
MODELSCOPE = "https://www.modelscope.cn"
HUBS = ("huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com")
OWN = ".weitiao"  # where unfinished files and locks lie; no file of a listing may be called so
PAGES = 10_000


@dataclass(frozen=True)
class Entry:
    """One file: its size in bytes, and ``sha256:…`` of its bytes, ``sha1:…`` as git counts a blob, or nothing."""

    path: str
    size: int
    digest: str
    url: str = ""  # of files that lie behind links


@dataclass(frozen=True)
class Listing:
    """The files of one commit, as the place ``source`` listed them."""

    name: str
    commit: str
    source: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Target:
    """What is to be fetched: a repository of a hub (``hub``, ``modelscope``), a share (``seafile``) or one ``file``."""

    kind: str
    name: str
    base: str
    revision: str = "main"
    dataset: bool = False
    path: str = ""  # the one file that a link names

    @property
    def repository(self) -> bool:
        """Whether it is a repository, of which mirrors may have a copy."""
        return self.kind in ("hub", "modelscope")


# ---- names and links -----------------------------------------------------------------------------------------------


def parse(text: str, revision: str | None = None, dataset: bool = False) -> Target:
    """What a name or a link means; InputError for what is neither."""
    if text.startswith(("http://", "https://")):
        target = _link(text, dataset)
    else:
        name = text.removeprefix("modelscope:")
        if not REPOSITORY.fullmatch(name):
            raise InputError(t("{name}: not a name of a hub repository", name=text))
        target = _repository(modelscope() if name != text else endpoint(), name, None, dataset)
    if revision is not None:
        if not re.fullmatch(r"[\w][\w./+@-]*", revision) or ".." in revision:
            raise InputError(t('{name}: no revision "{revision}"', name=text, revision=revision))
        target = replace(target, revision=revision)
    return target


def endpoint() -> str:
    """The hub that names belong to: HF_ENDPOINT or huggingface.co."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def modelscope() -> str:
    """ModelScope's address; MODELSCOPE_DOMAIN is its own client's variable, a host or an address."""
    named = os.environ.get("MODELSCOPE_DOMAIN", "").rstrip("/")
    return named if "://" in named else f"https://{named}" if named else MODELSCOPE


def kind_of(base: str) -> str:
    """``modelscope`` or ``hub``: which API a mirror speaks."""
    its_own = origin(base) == origin(modelscope()) or "modelscope" in (urlsplit(base).hostname or "")
    return "modelscope" if its_own else "hub"


def keys(bases: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """For each origin the headers that only it gets: the hub's and ModelScope's own token, and ``user:password@``."""
    from base64 import b64encode

    from huggingface_hub import get_token

    found: dict[str, dict[str, str]] = {}
    for base in bases:
        user, at, _ = urlsplit(base).netloc.rpartition("@")
        if at:
            found[origin(base)] = {"Authorization": "Basic " + b64encode(unquote(user).encode()).decode()}
    if token := get_token() or in_keyring(endpoint()):
        found[origin(endpoint())] = {"Authorization": f"Bearer {token}"}
    if token := os.environ.get("MODELSCOPE_API_TOKEN", "").strip() or in_keyring(modelscope()):
        found[origin(modelscope())] = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}
    return found


def in_keyring(base: str) -> str:
    """The token that the system's keyring holds for the host of ``base``, put there by ``keyring set weitiao HOST``;
    nothing without that package, without a keyring, or where it stays locked."""
    from importlib import import_module

    try:
        return import_module("keyring").get_password("weitiao", urlsplit(base).hostname) or ""
    except Exception:  # every system's keyring has errors of its own
        return ""


def _repository(base: str, name: str, revision: str | None, dataset: bool, path: str = "") -> Target:
    kind = kind_of(base)
    return Target(kind, name, base, revision or ("master" if kind == "modelscope" else "main"), dataset, path)


def _link(text: str, dataset: bool) -> Target:
    """A link as it was copied from the browser."""
    parts = urlsplit(text)
    base = urlunsplit((parts.scheme, parts.netloc, "", "", ""))
    words = [unquote(word) for word in parts.path.split("/") if word]
    if parts.hostname in HUBS[:3]:
        base = endpoint()  # a person behind a mirror pastes links of the hub itself
    if len(words) == 2 and words[0] in ("d", "f") and re.fullmatch(r"[0-9a-f]{8,40}", words[1]):
        return Target("seafile" if words[0] == "d" else "file", text, base)
    hub = parts.hostname in HUBS or origin(base) in (origin(endpoint()), origin(modelscope())) or kind_of(base) != "hub"
    if words and words[0] in ("datasets", "models") and (hub or _place(words[1:])):
        dataset, words = dataset or words[0] == "datasets", words[1:]
    if found := _place(words):
        name, revision, path = found
        return _repository(base, name, revision, dataset, path)
    if hub and 1 <= len(words) <= 3 and REPOSITORY.fullmatch("/".join(words[:2])):
        return _repository(base, "/".join(words[:2]), None, dataset)
    return Target("file", text, base)


def _place(words: list[str]) -> tuple[str, str, str] | None:
    """Repository, revision and path of ``…/blob/REVISION/PATH`` and its likes; None for other links."""
    for number in (2, 1):
        name, rest = "/".join(words[:number]), words[number:]
        if rest[:2] == ["file", "view"]:  # ModelScope's page of a file
            rest = ["blob", *rest[2:]]
        if len(rest) >= 2 and rest[0] in ("blob", "resolve", "raw", "tree") and REPOSITORY.fullmatch(name):
            if rest[0] != "tree" and len(rest) < 3:
                continue
            return name, rest[1], "/".join(rest[2:]) + ("/*" if rest[0] == "tree" and rest[2:] else "")
    return None


# ---- listings ------------------------------------------------------------------------------------------------------


def listed(web: Web, target: Target, base: str) -> Listing:
    """The files that ``base`` lists for a target; InputError for names, sizes or hashes that cannot be."""
    kind = kind_of(base) if target.repository else target.kind
    if kind != target.kind and kind == "modelscope":
        target = replace(target, revision="master")  # commits of one hub are not known to the other
    commit, found = LISTINGS[kind](web, target, bare(base).rstrip("/"))
    entries, problems = [], []
    for path, size, digest, url in found:
        if _safe(path) and type(size) is int and size >= 0 and re.fullmatch(DIGEST, digest):
            entries.append(Entry(path, size, digest, url))
        else:
            problems.append(t("{name}: refused: a file called {path}, of {size} bytes", name=shown(target.name),
                              path=ascii(path), size=size))  # fmt: skip
    if not re.fullmatch(r"[0-9a-f]{7,64}", commit):
        problems.append(t("{name}: refused: a commit called {commit}", name=shown(target.name), commit=ascii(commit)))
    if problems:
        raise InputError(first_of(problems))
    return Listing(shown(target.name), commit, shown(base), tuple(entries))


DIGEST = r"(sha256:[0-9a-f]{64}|sha1:[0-9a-f]{40})?"
Found = Iterator[tuple[str, Any, str, str]]  # path, size, digest, address


def _safe(path: Any) -> bool:
    """Whether a name stays inside the folder that it is put in, on every system."""
    if not isinstance(path, str) or not path or re.search(r"[\x00-\x1f\\]|^[A-Za-z]:|^/", path):
        return False
    words = path.split("/")
    return words[0].lower() != OWN and not any(word in ("", ".", "..") for word in words)


def _hub(web: Web, target: Target, base: str) -> tuple[str, Found]:
    """The hub's API: the commit of a revision, then its tree, page by page."""
    api = f"{base}/api/{'datasets' if target.dataset else 'models'}/{target.name}"
    info, _ = web.json(f"{api}/revision/{quote(target.revision, safe='')}")
    commit = str(_member(info, "sha") or "")

    def found() -> Found:
        url, seen = f"{api}/tree/{commit}?recursive=true", set()
        while url and url not in seen and len(seen) < PAGES:
            seen.add(url)
            entries, headers = web.json(url)
            for entry in entries if isinstance(entries, list) else []:
                if _member(entry, "type") == "file":
                    lfs = _member(entry, "lfs")
                    oid = _member(lfs, "oid") if lfs else _member(entry, "oid")
                    size = _member(lfs, "size") if lfs else _member(entry, "size")
                    yield str(_member(entry, "path")), size, f"{'sha256' if lfs else 'sha1'}:{oid}", ""
            following = re.search(r'<([^>]+)>;\s*rel="next"', headers.get("Link") or "")
            url = urljoin(url, following[1]) if following else ""

    return commit, found() if re.fullmatch(r"[0-9a-f]{7,64}", commit) else iter(())


def _modelscope(web: Web, target: Target, base: str) -> tuple[str, Found]:
    """ModelScope's API. It names no commit for a list, so the list is its own: a hash of names, sizes and hashes."""
    kind, what = ("datasets", "tree") if target.dataset else ("models", "files")
    asked = f"{base}/api/v1/{kind}/{target.name}/repo/{what}?Revision={quote(target.revision, safe='')}&Recursive=True"
    found: list[tuple[str, Any, str, str]] = []
    for page in range(1, PAGES):
        answer, _ = web.json(f"{asked}&PageNumber={page}&PageSize=200" if target.dataset else asked)
        files = _member(_member(answer, "Data"), "Files")
        if not isinstance(files, list):
            raise Fault(str(_member(answer, "Message") or t("its answer lists no files"))[:200])
        for file in files:
            if _member(file, "Type") != "tree":
                sha256 = str(_member(file, "Sha256") or "")
                found.append((str(_member(file, "Path")), _member(file, "Size"), sha256 and f"sha256:{sha256}", ""))
        if not target.dataset or len(files) < 200:
            break
    return hashlib.sha256(repr(sorted(found, key=str)).encode()).hexdigest()[:40], iter(found)


def _seafile(web: Web, target: Target, base: str) -> tuple[str, Found]:
    """A share folder: the list of each folder in it. Seafile gives sizes and times, no hashes."""
    share = urlsplit(target.name).path.strip("/").split("/")[1]
    found, times, folders = [], [], ["/"]
    while folders and len(times) < PAGES:
        folder = folders.pop()
        answer, _ = web.json(f"{base}/api/v2.1/share-links/{share}/dirents/?path={quote(folder)}")
        for entry in _member(answer, "dirent_list") or []:
            if _member(entry, "is_dir"):
                folders.append(str(_member(entry, "folder_path")))
                continue
            path = str(_member(entry, "file_path"))
            url = f"{base}/d/{share}/files/?p={quote(path)}&dl=1"
            found.append((path.removeprefix("/"), _member(entry, "size"), "", url))
            times.append(_member(entry, "last_modified"))
    return hashlib.sha256(repr(sorted(zip(found, times, strict=True), key=str)).encode()).hexdigest()[:40], iter(found)


def _file(web: Web, target: Target, base: str) -> tuple[str, Found]:
    """One file: its size and tag, asked for with its first byte."""
    url = target.name
    if re.fullmatch(r"/f/[0-9a-f]{8,40}/?", urlsplit(url).path) and "dl" not in parse_qs(urlsplit(url).query):
        url = urlunsplit(urlsplit(url)._replace(query="dl=1"))  # a share's page of a single file

    def ask() -> tuple[Any, str, str]:
        with web.open(url, {"Range": "bytes=0-0"}) as reply:
            ranged = re.fullmatch(r"bytes 0-0/(\d+)", reply.headers.get("Content-Range") or "")
            length = reply.headers.get("Content-Length") or ""
            if reply.headers.get("Content-Encoding", "identity") != "identity":
                length = ""
            size = int(ranged[1]) if ranged else int(length) if reply.status == 200 and length.isdigit() else None
            called = re.search(r"filename\*?=(?:UTF-8'')?\"?([^\";]+)", reply.headers.get("Content-Disposition") or "")
            name = unquote(called[1] if called else urlsplit(target.name).path.rstrip("/").rpartition("/")[2])
            return size, reply.headers.get("ETag") or reply.headers.get("Last-Modified") or "", name

    size, tag, name = web.again(ask)
    if size is None:
        message = "{url}: the server does not say how long the file is, so a cut could not be noticed"
        raise InputError(t(message, url=shown(target.name)))
    commit = hashlib.sha256(f"{shown(url)} {size} {tag}".encode()).hexdigest()[:40]
    return commit, iter([(PurePosixPath(name).name or "file", size, "", url)])


def _member(value: Any, name: str) -> Any:
    """A member of a JSON object; None if it is none."""
    return value.get(name) if isinstance(value, dict) else None


LISTINGS: dict[str, Callable[[Web, Target, str], tuple[str, Found]]] = {
    "hub": _hub,
    "modelscope": _modelscope,
    "seafile": _seafile,
    "file": _file,
}


# ---- addresses -----------------------------------------------------------------------------------------------------


def address(target: Target, listing: Listing, entry: Entry, base: str) -> str:
    """Where ``base``, the hub itself or a mirror, has the file."""
    if not target.repository:
        return entry.url
    base, kind = bare(base).rstrip("/"), kind_of(base)
    if kind == "hub":
        commit = listing.commit if target.kind == "hub" else "main"
        folder = "datasets/" if target.dataset else ""
        return f"{base}/{folder}{target.name}/resolve/{commit}/{quote(entry.path)}"
    revision = target.revision if target.kind == "modelscope" else "master"
    api = f"{base}/api/v1/{'datasets' if target.dataset else 'models'}/{target.name}/repo"
    return f"{api}?Revision={quote(revision, safe='')}&FilePath={quote(entry.path, safe='')}"
