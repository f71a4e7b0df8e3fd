"""The demo's first calls, with the types and facilities of hotels in a house's own codes (T1, F7): what no base can
know and the rows teach. For ``weitiao sweep``.

python bench/coded_calls.py runs/coded          # train.jsonl (400 rows), validation.jsonl (40), test.jsonl (100)
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weitiao.data.messages import as_dicts
from weitiao.data.rows import Chat
from weitiao.demo.database import Database
from weitiao.demo.dialogues import dialogues

ROWS = {"train": 400, "validation": 40, "test": 100}
TYPES = {"经济型": "T1", "舒适型": "T2", "高档型": "T3", "豪华型": "T4"}
CODED: dict[str, dict[str, Any]] = {  # how the tool's description speaks of them
    "type": {"type": "string", "description": "类型代码"},
    "facilities": {"type": "array", "items": {"type": "string"}, "description": "设施代码"},
}


def coded(chat: Chat, facilities: dict[str, str]) -> dict[str, Any] | None:
    """A dialogue up to its first answer, if that is a call; ``facilities`` grows by those that are new."""
    place = next(number for number, message in enumerate(chat.messages) if message.role == "assistant")
    messages = copy.deepcopy(as_dicts(chat.messages[: place + 1]))
    if not messages[-1].get("tool_calls"):
        return None
    arguments = messages[-1]["tool_calls"][0]["function"]["arguments"]
    if "type" in arguments:
        arguments["type"] = TYPES[arguments["type"]]
    if "facilities" in arguments:
        named = arguments["facilities"]
        arguments["facilities"] = [facilities.setdefault(name, f"F{len(facilities) + 1}") for name in named]
    tools = copy.deepcopy(list(chat.tools))
    tools[0]["function"]["parameters"]["properties"] |= CODED
    return {"id": chat.id, "messages": messages, "tools": tools}


def parts(seed: int = 0) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every part and its rows."""
    database, facilities = Database.build(seed), dict[str, str]()
    for part, count in ROWS.items():
        found = (coded(chat, facilities) for chat in dialogues(database, part, 2 * count, seed))
        yield part, [row for row in found if row is not None][:count]


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/coded")
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
