"""The picture in docs/*/plan.md: what a training step holds, planned and measured, of cells of the grid.

    python bench/plan/picture.py FOLDER/cells.jsonl 15,9 docs

FOLDER is the grid's; each cell is a bar, with the parts of its plan and a mark where the process really peaked.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PARTS = {  # of a plan: colour, and what it is called
    "imports": ("#8c8c8c", "libraries", "程序库"),
    "weights": ("#4878a8", "weights", "权重"),
    "optimizer": ("#6aa84f", "optimiser's state", "优化器状态"),
    "kernels": ("#b5852a", "compiled kernels", "编译的内核"),
    "gradients_and_activations": ("#c44e52", "gradients, activations, logits", "梯度、激活与 logits"),
}
WORDS = {"en": ("planned", "measured"), "zh": ("计划", "实测")}
LEFT, TOP, WIDTH, BAR, STEP = 20, 56, 640, 34, 84


def picture(lines: list[dict[str, Any]], language: str) -> str:
    """The bars as SVG, in one language."""
    planned, measured = WORDS[language]
    scale = WIDTH / max(max(line["planned"], line["measured"]) for line in lines)
    shapes, left = [], LEFT
    for colour, *names in PARTS.values():
        name = names[list(WORDS).index(language)]
        shapes.append(f'<rect x="{left}" y="14" width="12" height="12" fill="{colour}"/>')
        shapes.append(f'<text x="{left + 17}" y="25">{name}</text>')
        left += 34 + sum(13 if ord(letter) > 0x2E7F else 7 for letter in name)
    for number, line in enumerate(lines):
        top, left = TOP + number * STEP, float(LEFT)
        told = f"{line['name']}: {planned} {line['planned'] >> 20} MiB, {measured} {line['measured'] >> 20} MiB"
        shapes.append(f'<text x="{LEFT}" y="{top}">{told}</text>')
        for part, (colour, *_) in PARTS.items():
            width = line["parts"][part] * scale
            shapes.append(f'<rect x="{left:.1f}" y="{top + 8}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>')
            if line["parts"][part] * 20 > line["planned"]:
                middle = f'x="{left + width / 2:.1f}" y="{top + 30}"'
                shapes.append(f'<text {middle} fill="white" text-anchor="middle">{line["parts"][part] >> 20}</text>')
            left += width
        mark = LEFT + line["measured"] * scale
        shapes.append(f'<path d="M{mark:.1f} {top + 3}v{BAR + 10}" stroke="black" stroke-width="2"/>')
    high = TOP + len(lines) * STEP
    box = f"0 0 {WIDTH + 2 * LEFT} {high}"
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" font-size="12" font-family="sans-serif">'
    return "\n".join([frame, '<rect width="100%" height="100%" fill="white"/>', *shapes, "</svg>", ""])


if __name__ == "__main__":
    file, numbers, folder = Path(sys.argv[1]), [int(word) for word in sys.argv[2].split(",")], Path(sys.argv[3])
    known = {line["cell"]["number"]: line for line in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    for language in WORDS:
        drawn = picture([known[number] for number in numbers], language)
        (folder / language / "plan.svg").write_text(drawn, encoding="utf-8")
