"""What can be had on CrossWOZ's hotel turns without a model: an untrained parser, the baseline of the task ``hotel``.

    parser = Parser(hotels)                         # names from the database, where there is one
    parser.stated("要4.5分以上的豪华型酒店")            # {"type": "豪华型", "rating_range_lower": 4.5}
    parser.search(messages)                         # the search after all that was said

A lexicon of types, facilities and hotels' names, and the expressions by which ``crosswoz_raw.py`` reads the wizards'
own queries. It learns nothing: conditions add up until the guest looks for another hotel, and what it lacks is what
training has to add.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from weitiao.data.crosswoz_raw import FACILITIES, PRICE_BOTH, PRICE_ONE, RATING_EXACT, RATING_LOWER, TYPES
from weitiao.data.crosswoz_turns import Arguments, merge, wants_another
from weitiao.data.rows import Message

SHORTEST_NAME = 4  # characters; shorter ones are words of every day
FACILITY = re.compile("|".join(map(re.escape, sorted(FACILITIES, key=len, reverse=True))))
TYPE = re.compile("|".join(TYPES))


class Parser:
    """Reads what a guest says by a lexicon; ``hotels`` are the names that it knows."""

    def __init__(self, hotels: Sequence[str] = ()):
        names = sorted({"".join(name.split()) for name in hotels}, key=len, reverse=True)
        self.names = [name for name in names if len(name) >= SHORTEST_NAME]

    def stated(self, text: str) -> Arguments:
        """The arguments that one utterance states by itself."""
        text = "".join(text.split())
        found: dict[str, Any] = {"name": next((name for name in self.names if name in text), None)}
        text = text.replace(found["name"] or "\n", "")
        found["type"] = match.group() if (match := TYPE.search(text)) else None
        found["facilities"] = list(dict.fromkeys(FACILITY.findall(text)))
        if match := PRICE_BOTH.search(text):
            found |= {"price_range_lower": int(match[1]), "price_range_upper": int(match[2])}
        elif match := PRICE_ONE.search(text):
            found[f"price_range_{'lower' if match[2] == '以上' else 'upper'}"] = int(match[1])
        if match := RATING_LOWER.search(text) or RATING_EXACT.search(text):
            found["rating_range_lower"] = float(match[1])
            found["rating_range_upper"] = None if match.re is RATING_LOWER else float(match[1])
        return {slot: value for slot, value in found.items() if value}

    def search(self, messages: Sequence[Message]) -> Arguments:
        """The search after ``messages``: what the guest says adds up until another hotel is looked for. A hotel named
        for the first time is searched by its name; one that was offered is not searched again."""
        state: Arguments = {}
        said = ""
        for message in messages:
            if message.role == "user":
                new = self.stated(message.content)
                if new.get("name", "\n") in said:
                    del new["name"]
                if "name" in new:
                    state = {"name": new["name"]}
                else:
                    state = new if wants_another(message.content) else merge(state, new)
            said += message.content
        return state
