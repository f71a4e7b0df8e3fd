"""The READMEs' and the documentation's own commands run, in order, offline, on the embedded base.

A fence tagged ``bash`` is run and must succeed; ``bash fails`` must end with exit code 2, and the lines of the ``text``
fence behind it stand in what it printed; ``bash no-run`` needs a network, a large model or minutes: its verbs and make
targets must exist.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from weitiao.cli import VERBS

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.M | re.S)
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
PAGES = [*READMES, ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ENGLISH = [page for page in PAGES if "zh" not in page.relative_to(ROOT).as_posix()]


class Block(NamedTuple):
    """A fenced block: its language, the word behind it, its text."""

    language: str
    tag: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [Block(language, tag.strip(), text) for language, tag, text in found]


def run(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as a person in a shell would, in ``folder``."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "LC_ALL": "C.UTF-8", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=200,
        check=False,
    )


@pytest.fixture(scope="module")
def rows() -> str:
    """The block of the README that writes ``rows.jsonl``, which the other pages go on from."""
    return next(block.text for block in blocks(READMES[0]) if "> rows.jsonl" in block.text)


def translated(page: Path) -> Path:
    """The Chinese page beside an English one."""
    return page.with_name("README.zh.md") if page.name == "README.md" else ROOT / "docs" / "zh" / page.name


@pytest.mark.parametrize("page", [page for page in ENGLISH if translated(page).is_file()], ids=lambda page: page.name)
def test_the_chinese_page_has_the_same_commands(page: Path):
    ours, theirs = (
        [block for block in blocks(one) if block.tag != "no-run" and block.language in ("bash", "text")]
        for one in (page, translated(page))
    )
    assert ours == theirs


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_commands_run(page: Path, tmp_path: Path, rows: str):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    found = [block for block in blocks(page) if block.language in ("bash", "text")]
    if page not in READMES and any(block.language == "bash" for block in found):
        assert run(rows, tmp_path).returncode == 0
    for number, block in enumerate(found):
        if block.language != "bash" or block.tag == "no-run":
            continue
        done = run(block.text, tmp_path)
        said = f"{block.text}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == (2 if block.tag == "fails" else 0), said
        if block.tag == "fails":
            assert "error: " in done.stderr, said
            expected = found[number + 1]
            assert expected.language == "text"
            assert not [line for line in expected.text.splitlines() if line not in done.stderr], said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_verbs_and_targets_that_it_names_exist(page: Path):
    verbs = {verb.words for verb in VERBS}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for block in blocks(page):
        assert block.tag in ("", "no-run", "fails")
        for line in block.text.replace("\\\n", " ").splitlines() if block.language in ("bash", "sh") else []:
            words = shlex.split(line, comments=True) if re.match(r"\S*(weitiao|make)\s", line) else []
            if words and Path(words[0]).name == "weitiao":
                assert {" ".join(words[1:2]), " ".join(words[1:3])} & verbs, line
            elif words:
                assert {word for word in words[1:] if "=" not in word} <= targets, line


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_every_verb_is_in_the_table(page: Path):
    rows = re.findall(r"^\| `weitiao ([^`]+)` \|", page.read_text(encoding="utf-8"), re.M)
    assert rows == [verb.words for verb in VERBS]
