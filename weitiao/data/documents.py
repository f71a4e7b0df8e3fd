"""Documents to pieces that questions are asked about, each with the place it comes from.

    for piece in pieces(Path("manual.md")): piece.text, piece.lines, piece.heading
    asked(piece)                     # questions and answers that the document itself writes as such

Text is cut at empty lines, Markdown also at headings; a piece has about ``SIZE`` characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weitiao.errors import InputError, t

SIZE = 1200  # characters
FENCE = re.compile(r"^\s*(?:```|~~~)")
HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*\s*$")
QUESTION = re.compile(r"^\s*(?:\*\*)?(?:Q|Question|问|问题)\s*\d*\s*[:：.]\s*(?:\*\*)?\s*(.+?)\s*(?:\*\*)?$", re.I)
ANSWER = re.compile(r"^\s*(?:\*\*)?(?:A|Answer|答|回答)\s*\d*\s*[:：.]\s*(?:\*\*)?\s*(.*)$", re.I)


@dataclass(frozen=True)
class Piece:
    """A part of a document: its text, its first and last line, and the headings above it."""

    file: str
    text: str
    lines: tuple[int, int]
    heading: str = ""

    @property
    def source(self) -> dict[str, object]:
        """Where it comes from, as it is kept with a row."""
        return {"file": self.file, "lines": list(self.lines), "heading": self.heading}


def pieces(path: Path, size: int = SIZE) -> Iterator[Piece]:
    """The pieces of a txt, md or pdf file, in order. InputError for other kinds, for text that is not UTF-8, and for a
    PDF that cannot be read or has no text."""
    if path.suffix.lower() == ".pdf":
        yield from _pdf(path, size)
        return
    if path.suffix.lower() not in (".txt", ".md", ".markdown"):
        raise InputError(t("{path}: documents are txt, md or pdf files", path=path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(t("{path}: cannot be read: {reason}", path=path, reason=error.strerror)) from None
    except UnicodeDecodeError as error:
        raise InputError(t("{path}: not UTF-8 at byte {byte}", path=path, byte=error.start)) from None
    markdown = path.suffix.lower() != ".txt"
    for start, lines, heading in _sections(text.splitlines(), markdown):
        for first, last in _cut(lines, size):
            body = "\n".join(lines[first:last]).strip()
            if body:
                yield Piece(str(path), body, (start + first + 1, start + last), heading)


def _pdf(path: Path, size: int) -> Iterator[Piece]:
    """The pieces of every page; lines count from the page's first, and the page is the heading."""
    try:
        from pypdf import PdfReader  # pyright: ignore[reportMissingImports]
        from pypdf.errors import PyPdfError  # pyright: ignore[reportMissingImports]
    except ImportError:
        message = (
            '{path}: reading PDF needs pypdf: pip install "weitiao[pdf]"; or make it text: pdftotext -layout {path}'
        )
        raise InputError(t(message, path=path)) from None
    try:
        pages = [page.extract_text() for page in PdfReader(path).pages]
    except (OSError, PyPdfError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(t("{path}: not a PDF that can be read: {reason}", path=path, reason=error)) from None
    if not any(text.strip() for text in pages):
        message = "{path}: its pages have no text, only pictures; recognise it first: ocrmypdf {path} OUT.pdf"
        raise InputError(t(message, path=path))
    for number, text in enumerate(pages, 1):
        lines = text.splitlines()
        for first, last in _cut(lines, size):
            if body := "\n".join(lines[first:last]).strip():
                yield Piece(str(path), body, (first + 1, last), t("page {number}", number=number))


def _sections(lines: list[str], markdown: bool) -> Iterator[tuple[int, list[str], str]]:
    """(index of the first line, lines, headings above) of what stands between two headings."""
    above: dict[int, str] = {}
    start, fenced = 0, False
    for number, line in enumerate(lines):
        fenced ^= bool(FENCE.match(line))
        match = HEADING.match(line) if markdown and not fenced else None
        if match:
            yield start, lines[start:number], " > ".join(above.values())
            above = {level: text for level, text in above.items() if level < len(match[1])} | {len(match[1]): match[2]}
            start = number + 1
    yield start, lines[start:], " > ".join(above.values())


def _cut(lines: list[str], size: int) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of pieces of about ``size`` characters, cut at empty lines, or anywhere if there are
    none for long."""
    first = used = 0
    for number, line in enumerate(lines):
        if (used >= size and not line.strip()) or used >= 2 * size:
            yield first, number
            first, used = number, 0
        used += len(line)
    yield first, len(lines)


def asked(piece: Piece) -> list[tuple[str, str]]:
    """The questions that a piece itself asks and answers: ``Q: … A: …`` (``问：… 答：…``), or a heading that is one."""
    found: list[tuple[str, str]] = []
    question, answer = "", []
    for line in [*piece.text.splitlines(), "Q: end"]:
        if match := QUESTION.match(line):
            if question and "\n".join(answer).strip():
                found.append((question, "\n".join(answer).strip()))
            question, answer = match[1], []
        elif match := ANSWER.match(line):
            answer.append(match[1])
        elif answer:
            answer.append(line)
    heading = piece.heading.rpartition(" > ")[2]
    return [(heading, piece.text)] if heading.endswith(("？", "?")) and not found else found
