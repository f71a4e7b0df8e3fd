"""What is wrong with text that should be JSON, in a person's words and language.

try: json.loads("{'a': 1,}")
except json.JSONDecodeError as error: explained(error)      # single quotes; JSON has double ones
"""

from __future__ import annotations

import json
import re

from weitiao.errors import t

RIGHT = {"None": "null", "True": "true", "False": "false", "undefined": "null", "NULL": "null", "nan": "null"}
SHOWN = 20


def explained(error: json.JSONDecodeError) -> str:
    """What stands where the library gave up, and what JSON has instead; what the library says, if it is nothing
    common."""
    doc, place = error.doc, error.pos
    here = doc[place : place + 1]
    if error.msg.startswith("Illegal trailing comma"):  # of Python 3.13, which points at the comma
        here = doc[place + 1 :].lstrip()[:1]
    if here in ("}", "]") and doc[max(0, place - 1000) : place + 1].rstrip("}] \t\r\n").endswith(","):
        return t("a comma before the closing {sign}", sign=here)
    if here in ("'", "‘", "’"):
        return t('single quotes; JSON has double ones (")')
    if here in ("“", "”", "＂"):
        return t('the quotation mark {sign}; JSON has "', sign=here)
    if (word := re.match(r"[A-Za-z_]+", doc[place : place + SHOWN])) and word[0] in RIGHT:
        return t("{word}; JSON writes {right}", word=word[0], right=RIGHT[word[0]])
    rest = doc[place:].strip()[:SHOWN] if place < len(doc) else ""
    said = {
        "Expecting property name enclosed in double quotes": t("a key in double quotes is missing"),
        "Expecting value": t("expected a value, found {found}", found=json.dumps(rest, ensure_ascii=False)),
        "Expecting ':' delimiter": t("a colon is missing behind a key"),
        "Expecting ',' delimiter": t('a comma is missing, or a " within a text, which JSON writes \\"'),
        "Extra data": t("more stands behind its end; a line has one object"),
        "Unterminated string starting at": t("a text that begins here does not end"),
        "Invalid control character at": t("a tab or line break within a text; JSON writes \\t and \\n"),
        "Invalid \\escape": t("a backslash within a text; JSON writes \\\\"),
    }
    if not rest and error.msg.startswith("Expecting"):
        return t("it breaks off")
    return next((words for begin, words in said.items() if error.msg.startswith(begin)), error.msg)
