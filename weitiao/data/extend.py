"""A tokenizer grows by what new text needs, and its model by the rows for it.

    weitiao tokenizer extend MODEL rows.jsonl --tokens 2000 --output extended/

Characters that the tokenizer does not know come first; then, whatever its kind, pieces that stand side by side most
often are joined, as byte-pair encoding does (Sennrich et al., arXiv 1508.07909). Old tokens keep their ids. What the
model has for each token (embedding, output layer) begins, for a new one, as the mean of what stood for it before.
"""

from __future__ import annotations

import heapq
import json
import math
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weitiao.data import tokenizer_sentencepiece
from weitiao.data.templates import RECORD_FILE
from weitiao.data.tokenizer import labels, measure
from weitiao.errors import InputError, say, t

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

KINDS = ("BPE", "WordPiece", "Unigram", "WordLevel")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SAMPLE_ROWS = 4096


@dataclass(frozen=True)
class Piece:
    """A new token: how often it occurs, the two pieces it joins (none for a character), and the old tokens' ids that
    stood for it before (none if it was unknown)."""

    text: str
    count: int
    parts: tuple[str, ...]
    old: tuple[int, ...]


@dataclass(frozen=True)
class Grown:
    """A tokenizer with its new ``pieces``, whose ids are ``first``, ``first`` + 1, …"""

    tokenizer: Tokenizer
    pieces: tuple[Piece, ...]
    first: int


def grow(tokenizer: Tokenizer, texts: Iterable[str], count: int, min_frequency: int = 2) -> Grown:
    """``tokenizer`` with at most ``count`` tokens more, each of which occurs ``min_frequency`` times in ``texts``.

    InputError for a kind of tokenizer that is not known, and where the texts need no new token.
    """
    written = json.loads(tokenizer.to_str())["model"]
    kind, prefix = written["type"], written.get("continuing_subword_prefix") or ""
    if kind not in KINDS or (kind == "BPE" and (prefix or written.get("end_of_word_suffix"))):
        raise InputError(t("a {kind} tokenizer of this form cannot be extended", kind=kind))
    words = _words(tokenizer, texts)
    pieces = _unknown(tokenizer, words, kind, prefix, min_frequency)[:count]
    if kind != "WordLevel":
        wider = _with(tokenizer, pieces)
        pieces += _joined(wider, words, count - len(pieces), min_frequency, prefix, {p.text: p.old for p in pieces})
    if not pieces:
        raise InputError(t("the text needs no new tokens: the tokenizer knows all that occurs often in it"))
    return Grown(_with(tokenizer, pieces), tuple(pieces), _size(tokenizer))


def _size(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _words(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """What the tokenizer cuts by itself, each as often as it occurs: no token reaches from one into the next."""
    found: Counter[str] = Counter()
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        if tokenizer.pre_tokenizer:
            found.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
        else:  # SentencePiece: the mark of a space begins a word
            found.update(re.findall("▁*[^▁]+", normal))
    return found


def _unknown(tokenizer: Tokenizer, words: Counter[str], kind: str, prefix: str, min_frequency: int) -> list[Piece]:
    """The characters (the words, if the tokenizer knows only words) without a token, commonest first."""
    found: Counter[str] = Counter()
    for word, count in words.items():
        whole = [word] if kind == "WordLevel" else [*word[:1], *(prefix + character for character in word[1:])]
        for piece in whole:
            found[piece] += count
    new = [(piece, count) for piece, count in found.items() if tokenizer.token_to_id(piece) is None]
    new = sorted((item for item in new if item[1] >= min_frequency), key=lambda item: (-item[1], item[0]))
    return [Piece(piece, count, (), _old_ids(tokenizer, piece.removeprefix(prefix))) for piece, count in new]


def _old_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The ids that stand for ``text`` now, unknown ones left out."""
    unknown = _unknown_token(tokenizer)
    return tuple(token.id for token in tokenizer.model.tokenize(text) if token.value != unknown)


def _unknown_token(tokenizer: Tokenizer) -> str | None:
    written = json.loads(tokenizer.to_str())["model"]
    place = written.get("unk_id")
    return written.get("unk_token") if place is None else written["vocab"][place][0]


def _joined(
    tokenizer: Tokenizer,
    words: Counter[str],
    count: int,
    min_frequency: int,
    prefix: str,
    old: dict[str, tuple[int, ...]],
) -> list[Piece]:
    """At most ``count`` joins of neighbouring pieces, the commonest pair first. ``old`` is what stood for the pieces
    that are new already."""
    unknown, known = _unknown_token(tokenizer), tokenizer.get_vocab(with_added_tokens=True)
    spelled = [[token.value for token in tokenizer.model.tokenize(word)] for word in words]
    counts, pairs, where = list(words.values()), Counter(), defaultdict(set)

    def note(number: int, sign: int) -> set[tuple[str, str]]:
        found = set(pairwise(spelled[number]))
        for pair in pairwise(spelled[number]):
            pairs[pair] += sign * counts[number]
        return found

    for number in range(len(spelled)):
        for pair in note(number, 1):
            where[pair].add(number)
    heap = [(-times, pair) for pair, times in pairs.items()]
    heapq.heapify(heap)
    pieces: list[Piece] = []
    while heap and len(pieces) < count:
        times, pair = heapq.heappop(heap)
        if -times < min_frequency:
            break
        text = pair[0] + pair[1].removeprefix(prefix)
        if pairs[pair] != -times or text in known or any(part == unknown or BYTE.fullmatch(part) for part in pair):
            continue  # counted anew since, there already, or not a piece of text
        ids = sum((old[part] if part in old else (known[part],) for part in pair), ())
        pieces.append(Piece(text, -times, pair, ids))
        known[text], old[text] = -1, ids
        touched: set[tuple[str, str]] = set()
        for number in where.pop(pair):
            touched |= note(number, -1)
            spelled[number] = _join(spelled[number], pair, text)
            for changed in note(number, 1):
                where[changed].add(number)
                touched.add(changed)
        for changed in touched:
            if pairs[changed] > 0:
                heapq.heappush(heap, (-pairs[changed], changed))
    return pieces


def _join(pieces: Sequence[str], pair: tuple[str, str], text: str) -> list[str]:
    """``pieces`` with every ``pair`` as one, from the left."""
    found: list[str] = []
    for piece in pieces:
        if found and found[-1] == pair[0] and piece == pair[1]:
            found[-1] = text
        else:
            found.append(piece)
    return found


def _with(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Tokenizer:
    """The tokenizer with further tokens behind its last id."""
    from tokenizers import Tokenizer

    data, first = json.loads(tokenizer.to_str()), _size(tokenizer)
    names = {number: name for name, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    model = data["model"]
    if model["type"] == "Unigram":  # places are ids: the added tokens take theirs, far too improbable to be drawn
        rows, least = model["vocab"], min(score for _, score in model["vocab"]) - 100
        rows += [[names.get(place, f"<unused{place}>"), least] for place in range(len(rows), first)]
        scores, total = dict(rows), sum(piece.count for piece in pieces)
        for piece in pieces:
            apart = sum(scores[part] for part in piece.parts) if piece.parts else -math.inf
            scores[piece.text] = max(math.log(piece.count / total) - 1, apart + 0.01)  # dearer than its parts: unused
            rows.append([piece.text, scores[piece.text]])
    else:  # an added token that is not in the vocabulary would move behind the new ones
        vocabulary = model["vocab"]
        vocabulary |= {name: place for place, name in names.items() if name not in vocabulary}
        vocabulary |= {f"<unused{place}>": place for place in range(first) if place not in names}
        vocabulary |= {piece.text: first + number for number, piece in enumerate(pieces)}
    if model["type"] == "BPE":
        model["merges"] += [list(piece.parts) for piece in pieces if piece.parts]
    return Tokenizer.from_str(json.dumps(data, ensure_ascii=False))


# ---- the model -------------------------------------------------------------------------------------------------------


def extend(
    model: str, texts: Sequence[str], folder: str | Path, count: int, min_frequency: int = 2
) -> tuple[Grown, Tokenizer]:
    """Write the ``model`` with its tokenizer grown by ``texts`` into ``folder``; returns what grew, and what it was.

    Tensor by tensor, so that a model larger than the memory will do. InputError for a quantised folder.
    """
    from weitiao.models import shape
    from weitiao.models.load import load_tokenizer
    from weitiao.weights import fetch, inspect, tensors
    from weitiao.weights.folders import whole

    source, folder = fetch.resolve(model), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(t("{path}: exists already; name a new folder", path=folder))
    inspect.check_folder(source)
    config = inspect.read_json(source / shape.CONFIG_FILE)
    if "quantization_config" in config:
        raise InputError(t("{path}: its weights are quantised; extend the model it was made from", path=source))
    tokenizer = load_tokenizer(source)
    grown = grow(tokenizer.backend_tokenizer, texts, count, min_frequency)
    rows = config["vocab_size"]
    size = max(rows, grown.first + len(grown.pieces))
    per_token = _per_token(config)
    bytes_ = sum(file.stat().st_size for file in inspect.weight_files(source, []))
    with whole(folder, round(bytes_ * size / rows)) as temporary:
        tokenizer.save_pretrained(str(temporary))
        (temporary / "tokenizer.json").write_text(grown.tokenizer.to_str(pretty=True), encoding="utf-8")
        _write_models(source, temporary, grown, texts)
        for name in ("generation_config.json", RECORD_FILE):
            if (source / name).is_file():
                shutil.copy(source / name, temporary)
        text = json.dumps(config | {"vocab_size": size}, ensure_ascii=False, indent=2)
        (temporary / shape.CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        found = tensors.read(source)
        tensors.write(temporary, ((n, _longer(x, grown) if tuple(x.shape) in per_token else x) for n, x in found))
    return grown, tokenizer.backend_tokenizer


def _write_models(source: Path, folder: Path, grown: Grown, texts: Sequence[str]) -> None:
    """The folder's SentencePiece file with the new tokens, if it has one; where it would cut otherwise, none, which is
    said: a file that contradicts tokenizer.json is worse than none."""
    for name in tokenizer_sentencepiece.FILES:
        if not (source / name).is_file():
            continue
        content = tokenizer_sentencepiece.grown((source / name).read_bytes(), grown.tokenizer, grown.first)
        checked = texts[:SAMPLE_ROWS]
        if content is None:
            say("{name} is left out: its pieces are not the first tokens of tokenizer.json", name=name)
        elif odd := tokenizer_sentencepiece.differing(content, grown.tokenizer, checked):
            message = "{name} is left out: with the new tokens it would cut {odd} of {count} texts otherwise"
            say(message, name=name, odd=odd, count=len(checked))
        else:
            (folder / name).write_bytes(content)


def _per_token(config: Mapping[str, Any]) -> set[tuple[int, ...]]:
    """The shapes of the tensors that have a row for every token: those that grow with the vocabulary."""
    from weitiao.models import shape

    now = shape.read(dict(config)).tensors
    then = shape.read({**config, "vocab_size": config["vocab_size"] + 1}).tensors
    grows = {size for name, size in now.items() if then[name] != size}
    if others := sorted(name for name, size in now.items() if size in grows and then[name] == size):
        names = ", ".join(others[:5])
        raise InputError(t("{names}: as large as the embedding; which rows are tokens cannot be told", names=names))
    return grows


def _longer(tensor: Tensor, grown: Grown) -> Tensor:
    """A tensor [tokens, …] with rows for the new tokens: the mean of the old ones' rows, or, for what was unknown, a
    row drawn like the others."""
    import torch

    some = tensor[: grown.first : max(1, grown.first // SAMPLE_ROWS)].float()
    mean, spread = some.mean(0), some.std(0)
    noise = torch.randn((len(grown.pieces), *mean.shape), generator=torch.Generator().manual_seed(0))
    new = mean + noise * spread
    for row, piece in enumerate(grown.pieces):
        if piece.old:
            new[row] = tensor[list(piece.old)].float().mean(0)
    behind = tensor[grown.first + len(grown.pieces) :]  # rows that no token has
    return torch.cat([tensor[: grown.first], new.to(tensor.dtype), behind])


def verb(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a model folder, a hub repository or the embedded one")],
    files: Annotated[
        list[str], typer.Argument(help="files of rows or text, and data options such as columns.text=正文")
    ],
    output: Annotated[Path, typer.Option(help="the model folder to write")],
    tokens: Annotated[int, typer.Option(min=1, help="new tokens at most")] = 2000,
    min_frequency: Annotated[int, typer.Option(min=1, help="how often a new token occurs at least")] = 2,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad rows out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Give a model tokens for the text of FILES: a new model folder, and what the text takes before and after."""
    from weitiao.data.rows import text_of
    from weitiao.data.sources import arguments, read_all

    sources = read_all(*arguments(files, skip_bad))
    for line in (line for source in sources for line in source.said):
        say("{line}", line=line)
    texts = [text_of(row) for source in sources for row in source.rows]
    grown, before = extend(model, texts, output, tokens, min_frequency)
    found = {"before": measure(before, texts), "after": measure(grown.tokenizer, texts)}
    if as_json:
        print(json.dumps({"folder": str(output), "new_tokens": len(grown.pieces), **found}, ensure_ascii=False))
    else:
        for key, label in labels().items():
            print(f"{label}\t{found['before'][key]}\t→ {found['after'][key]}")
        print(output)
    say(
        "{count} new tokens; their rows know only what stood for them before: train them "
        "(method.name=full, or method.name=freeze method.embeddings=true)",
        count=len(grown.pieces),
    )
