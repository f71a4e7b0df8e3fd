"""Several tokenizers on the same texts: how many tokens they take, what they lose, what they split, how fast they are.

    weitiao tokenizer compare weitiao-tiny-zh ./my-tokenizer --text zh=news.txt --text en=mail.txt --html page.html

Without ``--text`` the texts are a few Chinese, English and program lines of ``tokenizer_samples.yaml``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weitiao.data import page
from weitiao.data.balance import SCRIPTS
from weitiao.errors import InputError, t
from weitiao.machine.terminal import show
from weitiao.runs import write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HAN = re.compile(SCRIPTS["Han"])
TIMED = 3  # runs, of which the fastest counts
AT_ONCE = 1024  # texts


def samples() -> dict[str, list[str]]:
    """The texts that are shipped, by kind."""
    import yaml

    return yaml.safe_load((files("weitiao.data") / "tokenizer_samples.yaml").read_text(encoding="utf-8"))


def measure(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> dict[str, Any]:
    """What a tokenizer makes of ``texts``, special tokens apart. ``split_han`` is the share of Chinese characters that
    are spread over several tokens, ``split_han_kinds`` that of the different ones; ``characters_per_second`` on as many
    cores as the tokenizers library takes."""
    tokens = unknown = changed = 0
    han: dict[str, list[int]] = {}
    for start in range(0, len(texts), AT_ONCE):
        some = list(texts[start : start + AT_ONCE])
        encoded: Any = tokenizer(some, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text, ids, offsets in zip(some, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            tokens += len(ids)
            unknown += ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
            changed += tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text
            for char, count in _covers(text, offsets):
                seen = han.setdefault(char, [0, 0])
                seen[0] += 1
                seen[1] += count > 1
    characters = sum(map(len, texts))
    occurrences = sum(seen for seen, _ in han.values())
    return {
        "texts": len(texts),
        "characters": characters,
        "tokens": tokens,
        "tokens_per_character": _ratio(tokens, characters),
        "bytes_per_token": _ratio(sum(len(text.encode("utf-8", "surrogatepass")) for text in texts), tokens),
        "unknown_tokens": unknown,
        "round_trip_errors": changed,
        "han": occurrences,
        "split_han": _ratio(sum(split for _, split in han.values()), occurrences),
        "split_han_kinds": _ratio(sum(split > 0 for _, split in han.values()), len(han)),
        "characters_per_second": round(characters / max(1e-9, _seconds(tokenizer, texts))),
    }


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _covers(text: str, offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """Every Chinese character of a text, and how many tokens have a part of it."""
    counts = [0] * len(text)
    for start, end in offsets:
        for place in range(start, end):
            counts[place] += 1
    return ((match[0], counts[match.start()]) for match in HAN.finditer(text))


def _seconds(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """The fastest of a few runs over all texts."""
    times = []
    for _ in range(TIMED):
        started = time.perf_counter()
        for start in range(0, len(texts), AT_ONCE):
            tokenizer(list(texts[start : start + AT_ONCE]), add_special_tokens=False, verbose=False)
        times.append(time.perf_counter() - started)
    return min(times)


# ---- the verb --------------------------------------------------------------------------------------------------------


def verb(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="models, runs, tokenizer folders, SentencePiece files")
    ],
    text: Annotated[
        list[str] | None, typer.Option(metavar="KIND=FILE", help="rows or text to compare on, such as zh=news.txt")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="also write a page with plots to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Tokens per character, bytes per token, unknowns, losses, split characters and speed of several tokenizers."""
    texts = _texts(text) if text else samples()
    tokenizers = _tokenizers(models)
    found = {
        name: {
            "vocabulary": len(tokenizer),
            "kinds": {kind: measure(tokenizer, lines) for kind, lines in texts.items()},
        }
        for name, tokenizer in tokenizers.items()
    }
    if as_json:
        print(json.dumps({"tokenizers": found}, ensure_ascii=False))
    else:
        _print(found)
    if html is not None:
        write_atomic(html, _page(found))
        print(html)


def _texts(words: Sequence[str]) -> dict[str, list[str]]:
    """The texts of every kind; a file without a kind is its own."""
    from weitiao.data.rows import text_of
    from weitiao.data.sources import DataOptions, read_all

    pairs = [("", "", word) if Path(word).exists() else word.partition("=") for word in words]
    named = [(kind, name) if name else (Path(kind).stem, kind) for kind, _, name in pairs]
    named = [(kind or Path(name).stem, name) for kind, name in named]
    found: dict[str, list[str]] = {}
    sources = read_all([name for _, name in named], DataOptions())
    for (kind, _), source in zip(named, sources, strict=True):
        found.setdefault(kind, []).extend(text_of(row) for row in source.rows)
    return found


def _tokenizers(models: Sequence[str]) -> dict[str, PreTrainedTokenizerFast]:
    """The tokenizers by the names they were given by; one InputError with all that cannot be loaded."""
    found, problems = {}, []
    for name in dict.fromkeys(models):
        try:
            tokenizer = _tokenizer(name)
            if not tokenizer.is_fast:
                raise InputError(t("{tokenizer}: needs a tokenizer.json (a fast tokenizer)", tokenizer=name))
            found[name] = tokenizer
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return found


def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    """That of a run, a model, a folder, or a SentencePiece file."""
    from transformers import PreTrainedTokenizerFast

    from weitiao.models.load import load_tokenizer
    from weitiao.runs import Run, is_run
    from weitiao.weights import fetch, sentencepiece

    if Path(name).suffix == ".model" and Path(name).is_file():
        model = sentencepiece.read(Path(name))
        unknown = next((piece for piece, _, kind in model.pieces if kind == sentencepiece.UNKNOWN), None)
        return PreTrainedTokenizerFast(tokenizer_object=sentencepiece.build(model), unk_token=unknown)
    return load_tokenizer(Run.open(name).final if is_run(name) else fetch.resolve(name))


def _lines(found: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, about in found.items():
        for kind, one in about["kinds"].items():
            split = f"{one['split_han']:.2%}" if one["han"] else "–"
            yield [
                *(name, f"{about['vocabulary']:,}", kind, f"{one['tokens']:,}", f"{one['tokens_per_character']:.3f}"),
                *(f"{one['bytes_per_token']:.2f}", f"{one['unknown_tokens']:,}", f"{one['round_trip_errors']:,}"),
                *(split, f"{one['characters_per_second']:,}"),
            ]


def _head() -> list[str]:
    return [
        *(t("tokenizer"), t("vocabulary"), t("text"), t("tokens"), t("tokens per character"), t("bytes per token")),
        *(t("unknown tokens"), t("texts that do not come back exactly"), t("Chinese characters in several tokens")),
        t("characters per second"),
    ]


def _print(found: Mapping[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(*_head(), box=box.SIMPLE_HEAD)
    for line in _lines(found):
        table.add_row(*line)
    show(table)


def _page(found: Mapping[str, Any]) -> str:
    parts = [page.table(_head(), _lines(found))]
    for title, key in ((t("tokens per character"), "tokens_per_character"), (t("bytes per token"), "bytes_per_token")):
        bars = {f"{name} {kind}": one[key] for name, about in found.items() for kind, one in about["kinds"].items()}
        parts += [page.heading(title), page.bars(bars, digits=3)]
    return page.page(t("tokenizers compared"), parts)
