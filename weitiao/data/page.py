"""One self-contained HTML page: headings, tables and plots as SVG, in the reader's language and without any other file.

page("rows.jsonl", [heading("Lengths"), histogram(lengths), bars({"好": 512, "差": 488}), table(["a"], [["1"]])])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from weitiao.errors import language

STYLE = """\
body { font: 15px/1.6 system-ui, "Noto Sans CJK SC", sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em;
  background: #fff; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin: 2em 0 .4em } p.bad { color: #b00 }
table { border-collapse: collapse; margin: .6em 0 } td, th { padding: .15em .7em; border-bottom: 1px solid #ddd;
  text-align: right; font-weight: normal; overflow-wrap: anywhere } th { color: #777 }
td:first-child, th:first-child { text-align: left }
svg { display: block; margin: .6em 0; max-width: 100%; height: auto } svg text { font: 12px system-ui; fill: #555 }
svg rect { fill: #3b7dd8 } svg line { stroke: #c33; stroke-dasharray: 4 3 } figure { margin: 1em 0 }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } td, th { border-color: #333 }
  svg text { fill: #aaa } p.bad { color: #f77 } svg rect { fill: #5b9df8 } }
"""
WIDTH, HEIGHT, BAR, LABEL = 720, 180, 20, 200
BINS = 40
SHOWN_BARS = 30
SHOWN_LABEL = 24


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page; ``parts`` are HTML already."""
    head = f'<!doctype html><html lang="{language()}"><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f"{head}<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, bad: bool = False) -> str:
    """A paragraph; ``bad`` in red."""
    kind = ' class="bad"' if bad else ""
    return f"<p{kind}>{escape(text)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; the first column is text, the others are numbers."""

    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def histogram(values: Sequence[int], marks: Mapping[str, int] | None = None) -> str:
    """How many ``values`` (at least one) lie where, with a line at each mark. The last bin takes what is far out."""
    ordered = sorted(values)
    low, far = ordered[0], ordered[min(len(ordered) - 1, int(0.995 * len(ordered)))]
    far = max([far, *(marks or {}).values()])
    width = max(1, -(-(far - low + 1) // BINS))
    counts = [0] * min(BINS, (far - low) // width + 1)
    for value in ordered:
        counts[min(len(counts) - 1, (value - low) // width)] += 1
    step, top = WIDTH / len(counts), max(counts)
    shapes = []
    for number, count in enumerate(counts):
        height, first = HEIGHT * count / top, low + number * width
        last = ordered[-1] if number == len(counts) - 1 else first + width - 1
        tip = f"<title>{first}–{last}: {count}</title>"
        place = f'x="{number * step:.1f}" y="{HEIGHT + 14 - height:.1f}"'
        shapes.append(f'<rect {place} width="{max(step - 1, 1):.1f}" height="{height:.1f}">{tip}</rect>')
    for name, value in (marks or {}).items():
        x = min(WIDTH, (value - low) / width * step)
        shapes.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="{HEIGHT + 14}"/>')
        side = "end" if x > WIDTH / 2 else "start"
        shapes.append(f'<text x="{x:.1f}" y="11" text-anchor="{side}">{escape(name)}: {value}</text>')
    shapes.append(f'<text x="0" y="{HEIGHT + 30}">{low}</text>')
    shapes.append(f'<text x="{WIDTH}" y="{HEIGHT + 30}" text-anchor="end">{ordered[-1]}</text>')
    return _svg(HEIGHT + 36, shapes)


def bars(counts: Mapping[str, float], digits: int = 0) -> str:
    """A bar for every name, as they come; of many, the first ``SHOWN_BARS``."""
    shapes = []
    most = max([*counts.values(), 1e-12])
    for number, (name, count) in enumerate(list(counts.items())[:SHOWN_BARS]):
        y, length = number * BAR, (WIDTH - LABEL - 90) * count / most
        short = name if len(name) <= SHOWN_LABEL else name[: SHOWN_LABEL - 1] + "…"
        label = f'<text x="{LABEL - 6}" y="{y + 14}" text-anchor="end">{escape(short)}</text>'
        size = f'x="{LABEL}" y="{y + 3}" width="{length:.1f}" height="{BAR - 6}"'
        bar = f"<rect {size}><title>{escape(name)}</title></rect>"
        shapes.append(f'{label}{bar}<text x="{LABEL + length + 5:.1f}" y="{y + 14}">{count:,.{digits}f}</text>')
    return _svg(BAR * len(shapes) + 6, shapes)


def _svg(height: int, shapes: Iterable[str]) -> str:
    box = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return f"<svg {box}>{''.join(shapes)}</svg>"
