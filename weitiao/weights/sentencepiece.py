"""A SentencePiece model as a tokenizer.json: pieces, merges and normalisation are read from the file itself.

    convert(Path("tokenizer.model"), folder, {"tokens": ["<|user|>"], "eos": "</s>", "pad": "<unk>"})

The file is a protobuf (github.com/google/sentencepiece, sentencepiece_model.proto); only the fields that matter are
read, so that neither protobuf nor sentencepiece is needed. BPE and unigram models are known.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weitiao.errors import InputError, t

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
SPACE = "▁"
LONG = 1 << 16  # more spaces than begin any text


@dataclass(frozen=True)
class Model:
    """What a SentencePiece file says: pieces with score and type, in the order of their ids."""

    pieces: tuple[tuple[str, float, int], ...]
    kind: int
    charsmap: bytes
    dummy_prefix: bool
    remove_spaces: bool


def read(path: Path) -> Model:
    """Parse ``path``; InputError for a file that is something else or cut short."""
    try:
        top = list(_fields(path.read_bytes()))
        pieces = tuple(_piece(value) for number, value in top if number == 1)
        trainer = dict(_fields(next((value for number, value in top if number == 2), b"")))
        normalizer = dict(_fields(next((value for number, value in top if number == 3), b"")))
    except (IndexError, struct.error, UnicodeDecodeError, TypeError, ValueError) as error:
        raise InputError(t("{path}: not a SentencePiece model ({reason})", path=path, reason=error)) from error
    kind = trainer.get(3, UNIGRAM)
    if not pieces or kind not in (UNIGRAM, BPE):
        raise InputError(t("{path}: not a SentencePiece model of BPE or unigram", path=path))
    return Model(pieces, kind, normalizer.get(2, b""), bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of every field of a protobuf message: int, bytes or float."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
        elif wire == 1:
            value, place = struct.unpack_from("<d", data, place)[0], place + 8
        elif wire == 5:
            value, place = struct.unpack_from("<f", data, place)[0], place + 4
        elif wire == 2:
            size, place = _varint(data, place)
            value, place = data[place : place + size], place + size
            if len(value) < size:
                raise ValueError("cut short")
        else:
            raise ValueError(f"wire type {wire}")
        yield number, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _piece(data: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(data))
    return fields[1].decode("utf-8"), fields.get(2, 0.0), fields.get(3, NORMAL)


def convert(path: Path, folder: Path, special: Mapping[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json of the model at ``path``; ``special``: ``tokens`` that follow the
    pieces, the ``prefix`` of every text, and the names of ``pad``, ``bos`` and ``eos``."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    tokenizer = build(read(path))
    if tokens := special.get("tokens"):
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if prefix := special.get("prefix"):
        ids = [(token, tokenizer.token_to_id(token)) for token in prefix]
        tokenizer.post_processor = TemplateProcessing(single=[*prefix, "$A"], special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": special[name] for name in ("pad", "bos", "eos") if name in special}
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **names}
    values["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def build(model: Model) -> Any:
    """The same tokenizer in the tokenizers library."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    unknown = next((place for place, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN), None)
    falls_back = any(kind == BYTE for _, _, kind in model.pieces)
    if model.kind == BPE:
        vocabulary = {piece: place for place, (piece, _, _) in enumerate(model.pieces)}
        name = None if unknown is None else model.pieces[unknown][0]
        inner = models.BPE(vocabulary, _merges(model), unk_token=name, fuse_unk=True, byte_fallback=falls_back)
    else:
        scored = [(piece, score) for piece, score, _ in model.pieces]
        inner = models.Unigram(scored, unk_id=unknown, byte_fallback=falls_back)
    tokenizer = Tokenizer(inner)
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_spaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if model.dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    added = (LONG if model.remove_spaces else 1) if model.dummy_prefix else 0
    tokenizer.decoder = decoders.Sequence(back + ([decoders.Strip(" ", added, 0)] if added else []))
    own = [piece for piece, _, kind in model.pieces if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in own])
    words = [piece for piece, _, kind in model.pieces if kind == USER]
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in words])
    return tokenizer


def _merges(model: Model) -> list[tuple[str, str]]:
    """The pairs that make a piece, best piece first: SentencePiece merges whatever makes the piece of highest score."""
    usable = {piece: place for place, (piece, _, kind) in enumerate(model.pieces) if kind in (NORMAL, USER)}
    found = []
    for piece in usable:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in usable and right in usable:
                found.append((-model.pieces[usable[piece]][1], usable[left], usable[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
