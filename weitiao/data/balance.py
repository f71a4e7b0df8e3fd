"""What rows are made of: the scripts they are written in, their labels, and the slots of their calls.

scripts(rows)         # {"Han": 970, "Latin": 20, "Han + Latin": 10}
labels(rows)          # {"好": 512, "差": 488}
slots(rows)           # {"search_hotels": {"calls": 900, "arguments": {"type": {"calls": 311, "values": {...}}}}}
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from weitiao.data.near import words_of
from weitiao.data.rows import Chat, Labelled, Row

# One character of a syllabic script counts as much as one word of an alphabet.
SCRIPTS = {
    "Han": r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]",
    "Kana": r"[\u3041-\u30fa\u30fc-\u30ff\uff66-\uff9d]",
    "Hangul": r"[\uac00-\ud7a3\u1100-\u11ff]",
    "Latin": r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+",
    "Cyrillic": r"[\u0400-\u052f]+",
    "Greek": r"[\u0370-\u03ff]+",
    "Arabic": r"[\u0600-\u06ff\u0750-\u077f]+",
    "Hebrew": r"[\u0590-\u05ff]+",
    "Devanagari": r"[\u0900-\u097f]+",
    "Thai": r"[\u0e00-\u0e7f]+",
}
_SCRIPT = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in SCRIPTS.items()))
MAIN = 0.8  # of a row's words, at which it counts as written in one script
MINOR = 0.1
MOST_VALUES = 20


def script_of(text: str) -> str:
    """The script that a text is written in, two of them (``Han + Latin``), or ``none`` where it has no letters.

    Kana makes a text Japanese, whose Han characters count as kana."""
    counts = Counter(str(match.lastgroup) for match in _SCRIPT.finditer(text))
    if counts["Kana"] >= MINOR * (counts["Kana"] + counts["Han"]) > 0:
        counts["Kana"] += counts.pop("Han", 0)
    total = counts.total()
    if not total:
        return "none"
    main = [name for name, count in counts.most_common(2) if count >= MINOR * total]
    return main[0] if counts[main[0]] >= MAIN * total else " + ".join(sorted(main))


def scripts(rows: Iterable[Row]) -> dict[str, int]:
    """How many rows are written in each script, most first."""
    return dict(Counter(script_of(words_of(row)) for row in rows).most_common())


def labels(rows: Iterable[Row]) -> dict[str, int]:
    """How many rows have each label, most first; of numbers with a point there is no balance, and none is given."""
    counts: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, Labelled) and not isinstance(row.label, float):
            counts.update(row.label if isinstance(row.label, tuple) else (str(row.label),))
    return dict(counts.most_common())


def slots(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """For every tool the number of its calls, and for every argument in how many of them it stands, how many different
    values it has, and the most frequent of these."""
    found: dict[str, dict[str, Any]] = {}
    for call in (call for row in rows if isinstance(row, Chat) for message in row.messages for call in message.calls):
        tool = found.setdefault(call.name, {"calls": 0, "arguments": {}})
        tool["calls"] += 1
        for name, value in call.arguments.items():
            argument = tool["arguments"].setdefault(name, {"calls": 0, "values": Counter()})
            argument["calls"] += 1
            argument["values"].update(map(_said, value if isinstance(value, list) else [value]))
    for tool in found.values():
        tool["arguments"] = {name: _summary(argument) for name, argument in tool["arguments"].items()}
    return found


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _summary(argument: Mapping[str, Any]) -> dict[str, Any]:
    values: Counter[str] = argument["values"]
    return {
        "calls": argument["calls"],
        "different": len(values),
        "values": dict(values.most_common(MOST_VALUES)),
    }
