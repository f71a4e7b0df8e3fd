"""Broken encodings: text that was decoded with the wrong table, found and, where that is certain, put right.

broken("ä½ å¥½")             # "你好": UTF-8 that was read as Latin-1
broken("锟斤拷")              # "": cannot be put right, what stood there is lost
broken("你好")               # None: nothing wrong
"""

from __future__ import annotations

import re
import unicodedata

LOST = re.compile("锟斤|斤拷|烫烫烫|屯屯屯|�")  # U+FFFD read as GBK, and what Windows fills unused memory with
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff\u200b\u2028\u2029]")


def _table() -> dict[str, int]:
    """The byte of every character that Windows-1252 or Latin-1 has for one."""
    found = {chr(byte): byte for byte in range(256)}
    for byte in range(0x80, 0xA0):
        try:
            found[bytes([byte]).decode("cp1252")] = byte
        except UnicodeDecodeError:
            continue
    return found


BYTES = _table()
_AFTER = "[" + "".join(re.escape(char) for char, byte in BYTES.items() if 0x80 <= byte < 0xC0) + "]"
# Runs of UTF-8 sequences as Latin-1 shows them. Two bytes alone are taken only where they begin with Â or Ã: behind any
# other accented letter a quotation mark may well stand (CAFÉ»).
_LATIN = re.compile(f"(?:[à-ï]{_AFTER}{{2}}|[ð-ô]{_AFTER}{{3}}|[ÂÃ]{_AFTER}|[Ä-ß]{_AFTER}(?=[Ä-ß]{_AFTER})|"
                    f"(?<=[Ä-ß]{_AFTER})[Ä-ß]{_AFTER})+")  # fmt: skip
_HIGH = re.compile("[" + "".join(re.escape(char) for char, byte in BYTES.items() if byte >= 0x80) + "]{4,}")
_WIDE = re.compile("[^\x00-\x7f]{3,}")


def broken(text: str) -> str | None:
    """What ``text`` was before it was decoded wrongly; "" where that is lost, None where nothing is wrong."""
    if text.isascii():
        return None
    if LOST.search(text):
        return ""
    mended = _HIGH.sub(lambda run: _decoded(run[0], "utf-8") or _chinese(_decoded(run[0], "gbk")) or run[0], text)
    mended = _LATIN.sub(lambda run: _decoded(run[0], "utf-8") or run[0], mended)
    mended = _WIDE.sub(lambda run: _from_gbk(run[0]) or run[0], mended)
    return None if mended == text else mended


def is_gbk(raw: bytes) -> bool:
    """Whether bytes that are not UTF-8 read as Chinese in GB18030, of which GBK is a part."""
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError:
        return False
    wide = [char for char in text if not char.isascii()]
    return len(wide) > 1 and bool(_chinese("".join(char for char in wide if char.isalpha())))


def _decoded(run: str, encoding: str) -> str:
    """The bytes that ``run`` shows in Latin-1 or Windows-1252, decoded; "" if they are not of this encoding."""
    try:
        return bytes(BYTES[char] for char in run).decode(encoding)
    except (KeyError, UnicodeDecodeError):
        return ""


def _from_gbk(run: str) -> str:
    """UTF-8 that was read as GBK, read rightly; "" if it is none. Chinese as it should be hardly ever is."""
    try:
        return _chinese(run.encode("gbk").decode("utf-8"))
    except (UnicodeEncodeError, UnicodeDecodeError):
        return ""


def _chinese(text: str) -> str:
    """``text`` if it is two or more letters, most of them Chinese; "" otherwise."""
    han = sum("\u4e00" <= char <= "\u9fa5" for char in text)
    whole = all(unicodedata.category(char) not in ("Co", "Cn", "Cc") for char in text)
    return text if whole and han >= 2 and han >= len(text) / 2 else ""
