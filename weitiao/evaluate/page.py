"""A report in Markdown as one HTML file that needs nothing beside it: pictures are inside, no script, no network.

write_page("runs/first/report.md")                      # runs/first/report.html
"""

from __future__ import annotations

import base64
import html
import mimetypes
import re
from collections.abc import Sequence
from pathlib import Path

from weitiao.errors import language
from weitiao.runs import write_atomic

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.6 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; margin-top: 2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.9rem; }
th, td { border: 1px solid #8886; padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; }
th { background: #8882; }
img { max-width: 100%; background: white; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9em; background: #8882; }
pre { padding: 0.6rem; overflow-x: auto; }
"""
IMAGE = re.compile(r'<img src="([^":]+)"')


def write_page(source: str | Path, more: Sequence[str | Path] = (), before: str = "") -> Path:
    """Write the page of a Markdown file, with the Markdown ``before`` it and the files ``more`` behind it, beside it as
    .html; returns its path. A picture that is not there is left as it is; what looks like HTML in the text stays
    text."""
    source = Path(source)
    texts = [(Path(path).read_text(encoding="utf-8"), Path(path).parent) for path in (source, *more)]
    parts = [body(text, folder) for text, folder in ([(before, source.parent)] if before else []) + texts]
    title = re.search(r"^# (.+)$", texts[0][0], re.M)
    name = html.escape(title[1] if title else source.stem)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    text = f'<!doctype html>\n<html lang="{language()}"><head>{head}<style>{STYLE}</style></head>\n<body>\n'
    target = source.with_suffix(".html")
    write_atomic(target, text + "<hr>\n".join(parts) + "</body></html>\n")
    return target


def body(text: str, folder: Path) -> str:
    """Markdown as HTML, pictures of ``folder`` as data."""
    from markdown_it import MarkdownIt

    made = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return IMAGE.sub(lambda found: f'<img src="{_data(folder / html.unescape(found[1]), found[1])}"', made)


def _data(path: Path, name: str) -> str:
    """A picture as a data address; its name where there is none."""
    if not path.is_file():
        return name
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
