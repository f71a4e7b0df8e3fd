"""ChatGLM-6B's own tokenizer, a folder's ``ice_text.model``, as one of the tokenizers library, with its chat template.

    tokenizer = load(Path("chatglm-6b"))

The file is a SentencePiece model in which a line break, a tab and runs of 2 to 80 spaces are pieces of their own
(``<n>``, ``<|tab|>``, ``<|blank_2|>`` …), which the published code puts into the text beforehand. Here each of them is
one character of a private plane, so that the pieces around it are cut as SentencePiece cuts them. Of the revisions
with 20,000 image tokens before the text's (March 2023), whose special tokens stand in no file, none is read.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao.errors import InputError, t
from weitiao.weights import sentencepiece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE = "ice_text.model"
NAMES = {"bos": "<sop>", "eos": "<eop>", "pad": "<pad>", "unk": "<unk>", "mask": "[MASK]"}
OTHERS = ("[gMASK]", "[sMASK]", "<unused_0>", "<ENC>", "<dBLOCK>")
SPACES = {"<n>": "\n", "<|tab|>": "\t"} | {f"<|blank_{count}|>": " " * count for count in range(80, 1, -1)}
PRIVATE = 0xF0000  # the first character of a plane that no text uses
POSITIONS = 2048


def load(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a published folder; InputError for an older revision, or a file that is something else."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build(folder / FILE),
        additional_special_tokens=list(OTHERS),
        chat_template=(files("weitiao.models") / "templates" / "chatglm.jinja").read_text("utf-8"),
        model_max_length=POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in NAMES.items()},
    )
    tokenizer.name_or_path = str(folder)
    return tokenizer


def build(path: Path) -> Any:
    """The tokenizer itself; a text is followed by ``[gMASK] <sop>``, as in the published code."""
    from tokenizers import decoders, normalizers, processors

    model, special = sentencepiece.read(path), {*NAMES.values(), *OTHERS}
    if missing := sorted(special - {piece for piece, _, _ in model.pieces}):
        message = "{path}: lacks {names}, as the revisions of March 2023 do; take a newer one (130528 tokens)"
        raise InputError(t(message, path=path, names=", ".join(missing)))
    signs = {piece: chr(PRIVATE + number) for number, piece in enumerate(SPACES)}
    pieces = tuple((signs.get(piece, piece), score, _kind(piece, kind)) for piece, score, kind in model.pieces)
    tokenizer = sentencepiece.build(replace(model, pieces=pieces))
    texts = [(text, signs[piece]) for piece in SPACES for text in (piece, SPACES[piece])]
    before = [normalizers.Replace(text, sign) for text, sign in texts]
    tokenizer.normalizer = normalizers.Sequence([*before, tokenizer.normalizer])
    behind = [decoders.Replace(sign, SPACES[piece]) for piece, sign in signs.items()]
    tokenizer.decoder = decoders.Sequence([tokenizer.decoder, *behind])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[gMASK]", "<sop>", "<eop>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [gMASK] <sop>", pair="$A [gMASK] <sop> $B <eop>", special_tokens=ends
    )
    return tokenizer


def _kind(piece: str, kind: int) -> int:
    """What a piece is to SentencePiece, said so that only special tokens cut a text."""
    if piece in SPACES:
        return sentencepiece.NORMAL
    return sentencepiece.CONTROL if piece in (*NAMES.values(), *OTHERS) and piece != NAMES["unk"] else kind
