"""The documentation: both languages have the same pages, links lead somewhere, the options page is not stale."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "recipes").glob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def options():
    """docs/options.py as a module."""
    return module("options")


def module(name: str):
    """A file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_both_languages_have_the_same_pages():
    assert {path.name for path in (DOCS / "en").glob("*.md")} == {path.name for path in (DOCS / "zh").glob("*.md")}


@pytest.mark.parametrize("name", sorted(path.name for path in (DOCS / "en").glob("*.md")))
def test_pages_in_both_languages_have_the_same_sections_and_tables(name: str):
    if name == "options.md":  # compared as a whole below
        return
    english, chinese = ((DOCS / language / name).read_text(encoding="utf-8") for language in ("en", "zh"))
    assert len(re.findall(r"^#+ ", english, re.M)) == len(re.findall(r"^#+ ", chinese, re.M))
    assert len(re.findall(r"^\|", english, re.M)) == len(re.findall(r"^\|", chinese, re.M))


def test_both_readmes_have_the_same_sections_and_tables():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    assert len(re.findall(r"^#+ ", english, re.M)) == len(re.findall(r"^#+ ", chinese, re.M))
    assert len(re.findall(r"^\|", english, re.M)) == len(re.findall(r"^\|", chinese, re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    targets = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert not [link for link in targets if not (page.parent / link).exists()]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_page_is_in_the_index(language: str):
    index = (DOCS / language / "index.md").read_text(encoding="utf-8")
    pages = {path.name for path in (DOCS / language).glob("*.md")} - {"index.md"}
    assert not [name for name in pages if f"({name})" not in index]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_options_page_is_what_the_options_say(language: str):
    written = (DOCS / language / "options.md").read_text(encoding="utf-8")
    assert written == options().pages()[language], "run: python docs/options.py"


def test_every_option_has_a_meaning_and_no_translation_is_left_over():
    module = options()
    found = {
        key: meaning for section, cls in module.SECTIONS.items() for key, _, _, meaning in module.fields(section, cls)
    }
    chinese = module.yaml.safe_load((DOCS / "zh" / "options.yaml").read_text(encoding="utf-8"))
    assert not [key for key, meaning in found.items() if not meaning]
    assert set(found) == set(chinese)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_several_devices_promise_is_what_the_formulas_say(language: str):
    lines = (DOCS / language / "several.md").read_text(encoding="utf-8").splitlines()
    scaling = module("scaling")
    assert [line for line in lines if line.startswith(tuple(f"| {method} |" for method in scaling.METHODS))] == [
        *scaling.volumes(),
        *scaling.shares(),
    ]
