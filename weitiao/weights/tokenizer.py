"""The files of a tokenizer, bounded before the tokenizers library reads them.

    check("models/qwen2-0.5b")                      # InputError names every file that says what cannot be

The library believes its file: a fixed padding of a thousand million, a pattern that takes for ever, a replacement of
one letter by a million. Published tokenizers stay far below the limits here (Gemma's file, the largest, has 33 MB).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weitiao.errors import InputError, t
from weitiao.weights import bounded
from weitiao.weights.archive import Refused

SIZES = {  # bytes of a file at most
    "tokenizer.json": 128 << 20,
    **dict.fromkeys(("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"), 64 << 20),
    **dict.fromkeys(
        ("sentencepiece.bpe.model", "ice_text.model", "added_tokens.json", "tokenizer_config.json"), 64 << 20
    ),
    **dict.fromkeys(("special_tokens_map.json", "generation_config.json", "chat_template.json"), 4 << 20),
    "chat_template.jinja": 1 << 20,
}
IDS = 1 << 24
DEEP = 48  # levels of lists and objects
PATTERN_CHARACTERS, SHORT, GROWTH, POSITIONS, PARTS = 20_000, 16, 1 << 16, 1 << 24, 1000
REPEATED = re.compile(r"\((?:[^()\\]|\\.)*[+*](?:[^()\\]|\\.)*\)(?:[+*]|\{\d*,\d*\})(?!\+)")  # (a+)+ takes for ever
UP = re.compile(r"(^|[/\\])\.\.([/\\]|$)")


def check(folder: Path) -> None:
    """InputError for every file of the folder's tokenizer that is too large or says what cannot be."""
    problems: list[str] = []
    for name, most in SIZES.items():
        path = folder / name
        try:
            if path.is_file() and name.endswith(".json"):
                CHECKS.get(name, lambda values: None)(bounded.json_object(path, most))
            elif path.is_file() and (size := path.stat().st_size) > most:
                message = "{path}: {size} bytes are more than such a file has ({limit}); it is not read"
                problems.append(t(message, path=path, size=size, limit=most))
        except Refused as error:
            problems.append(t("{path}: refused: {reason}", path=path, reason=error.said()))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)


def _check_tokenizer(values: Mapping[str, Any]) -> None:
    """tokenizer.json: ids, widths, patterns and what makes a text longer."""
    small = {key: value for key, value in values.items() if key != "model"}
    model = values.get("model")
    if not isinstance(model, Mapping):
        raise Refused("it has no model")
    if not bounded.depth(small, DEEP) or not bounded.depth(model, DEEP):
        raise Refused("it nests values more than {depth} deep", depth=DEEP)
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, Mapping):
        _ids(vocabulary.values(), len(vocabulary))
    tokens = values.get("added_tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(token, Mapping) for token in tokens):
        raise Refused("added_tokens is no list of tokens")
    _ids((token.get("id") for token in tokens), len(tokens))
    for key, value in _pairs(small):
        _limited(key, value)
    growth = 1
    for key, value in _pairs(values.get("normalizer")):
        if key in ("content", "prepend") and isinstance(value, str) and len(value) > SHORT:
            growth *= len(value)
        if growth > GROWTH:
            raise Refused("its replacements make a text more than {times} times as long", times=GROWTH)
    _positions(values)


def _ids(numbers: Any, count: int) -> None:
    for number in numbers:
        if type(number) is not int or not 0 <= number < IDS + count:
            raise Refused("a token has the id {number}", number=number)


def _pairs(values: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth (of what is known to be shallow)."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield key, value
            yield from _pairs(value)
    elif isinstance(values, list):
        for value in values:
            yield from _pairs(value)


def _limited(key: str, value: Any) -> None:
    """Refused for a pattern or a list beyond all use."""
    if key in ("Regex", "pattern") and isinstance(value, str):
        if len(value) > PATTERN_CHARACTERS or REPEATED.search(value):
            raise Refused("a pattern could take for ever: {pattern}", pattern=value[:80])
    elif key in ("single", "pair", "ids") and isinstance(value, list) and len(value) > PARTS:
        raise Refused("{name} has {count} parts", name=key, count=len(value))


def _positions(values: Mapping[str, Any]) -> None:
    """Lengths that the library would pad or cut to."""
    padding, cut = values.get("padding") or {}, values.get("truncation") or {}
    strategy = padding.get("strategy") if isinstance(padding, Mapping) else None
    lengths = [
        strategy.get("Fixed", 0) if isinstance(strategy, Mapping) else 0,
        padding.get("pad_to_multiple_of") or 0 if isinstance(padding, Mapping) else 0,
        cut.get("max_length", 0) if isinstance(cut, Mapping) else 0,
        (values.get("model") or {}).get("max_input_chars_per_word") or 0,
    ]
    if wrong := [one for one in lengths if type(one) is not int or not 0 <= one <= POSITIONS]:
        raise Refused("it pads or cuts to a length of {length}", length=wrong[0])


def _check_config(values: Mapping[str, Any]) -> None:
    """tokenizer_config.json: names of files stay in the folder; ids are ids."""
    for key, value in values.items():
        names = value if isinstance(value, list) else [value]
        if key.endswith(("_file", "_files")) and any(isinstance(name, str) and UP.search(name) for name in names):
            raise Refused("{name} leads out of the folder: {path}", name=key, path=str(value)[:80])
        if key == "fast_tokenizer_files" and any("/" in str(name) or "\\" in str(name) for name in names):
            raise Refused("{name} leads out of the folder: {path}", name=key, path=str(value)[:80])
    added = values.get("added_tokens_decoder") or {}
    if not isinstance(added, Mapping) or not all(str(number).isdecimal() and len(str(number)) < 9 for number in added):
        raise Refused("added_tokens_decoder is no table of ids")


def _check_added(values: Mapping[str, Any]) -> None:
    _ids(values.values(), len(values))


CHECKS = {"tokenizer.json": _check_tokenizer, "tokenizer_config.json": _check_config, "added_tokens.json": _check_added,
          "vocab.json": _check_added}  # fmt: skip
