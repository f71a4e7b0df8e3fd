"""``weitiao data show``: every token is there, trained ones are told from the others, problems are named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from weitiao.cli import main
from weitiao.data.check import check
from weitiao.data.render import Renderer
from weitiao.data.rows import Call, Chat, Message, Text
from weitiao.data.show import html_page, shown_rows, tokens_of, visible
from weitiao.models import tiny

ROWS = [
    {"messages": [{"role": "user", "content": "你好 😀 <b>"}, {"role": "assistant", "content": "您好！\n请问 x<y"}]},
    {"messages": [{"role": "user", "content": "bye"}, {"role": "assistant", "content": "再见"}]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show") / "qwen2"
    tiny.make("qwen2", folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


def renderer(family: str = "qwen2") -> Renderer:
    return Renderer.of(tiny.make_tokenizer(family))


@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen2", "glm"])
def test_the_tokens_put_together_are_the_text(family: str):
    chat = Chat((Message("user", "你好 😀🏨"), Message("assistant", "é 您好！ \ufffd 🏨")))
    chosen = renderer(family)
    (made,) = chosen.renders([chat])
    assert isinstance(made, list)
    tokens = list(tokens_of(made[0], chosen.marker))
    assert "".join(token.text for token in tokens) == made[0].text
    assert [index for token in tokens for index in token.ids] == made[0].ids
    trained = "".join(token.text for token in tokens if token.trained)
    assert trained.strip().startswith("é 您好") and "你" not in trained
    assert any(token.special and token.trained for token in tokens)


def test_rows_with_nothing_to_train_on_are_problems():
    chats = [Chat((Message("user", "a"),), id="x:1"), Chat((Message("user", "a"), Message("assistant", "b")), id="x:2")]
    shown, problems = shown_rows([*chats, Text("words", id="x:3")], renderer(), "assistant")
    assert [row.trained > 0 for row in shown] == [False, True, True]
    assert len(problems) == 1 and "x:1" in problems[0]


def test_white_space_is_visible():
    assert visible("a b\n\tc\u3000") == "a·b⏎\n⇥\tc□"


def test_a_page_stands_alone_and_escapes():
    shown, _ = shown_rows(
        [Chat((Message("user", "<script>alert(1)</script>"), Message("assistant", "&amp;")))], renderer(), "last"
    )
    page = html_page("<rows>", shown, ["said & done"])
    assert "<script>" not in page and "&lt;rows&gt;" in page and "said &amp; done" in page
    assert "http" not in page and "src=" not in page and 'title="' in page


def call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["data", "show", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_trained_text_stands_in_brackets_where_there_are_no_colours(rows: Path, model: Path, capsys: Any):
    code, out, _ = call([str(rows), "--model", str(model)], capsys)
    assert code == 0
    assert "⟦您好！⏎\n请问·x<y<|im_end|>⟧" in out and "⟦再见<|im_end|>⟧" in out
    assert "2 of 2 rows" in out


def test_json_holds_every_token(rows: Path, model: Path, capsys: Any):
    code, out, _ = call([str(rows), "--model", str(model), "--json", "--rows", "1"], capsys)
    report = json.loads(out)
    assert code == 0 and report["rows"] == 2 and len(report["examples"]) == 1 and report["template"] == "own"
    (example,) = report["examples"]
    assert sum(len(piece["ids"]) for piece in example["pieces"]) == example["tokens"]
    trained = sum(len(piece["ids"]) for piece in example["pieces"] if piece["trained"])
    assert trained == example["trained_tokens"]


def test_a_page_is_written(rows: Path, model: Path, tmp_path: Path, capsys: Any):
    page = tmp_path / "page.html"
    code, _, err = call([str(rows), "--model", str(model), "--html", str(page), "--train-on", "all"], capsys)
    assert code == 0 and str(page) in err
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_bad_rows_and_bad_usage_end_in_2(rows: Path, model: Path, capsys: Any):
    assert call([str(rows), "--model", str(model), "--train-on", "user"], capsys)[0] == 2
    code, _, err = call([str(rows) + "x", "--model", str(model)], capsys)
    assert code == 2 and err.startswith("error: ")


SCHEMA = {"name": "find", "parameters": {"type": "object", "properties": {"name": {"type": "string"}}}}
CALLS = Chat(
    (
        Message("system", "帮客人找酒店。"),
        Message("user", "找北京饭店"),
        Message("assistant", calls=(Call("find", {"name": "北京饭店"}),)),
        Message("tool", "[1]", name="find"),
        Message("assistant", "找到了。"),
        Message("user", "谢谢"),
        Message("assistant", "不客气！"),
    ),
    ({"type": "function", "function": SCHEMA},),
    "calls",
)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_training_is_what_is_served_for_every_family(family: str):
    tokenizer = tiny.make_tokenizer(family)
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    found = check([CALLS, Chat(CALLS.messages[5:])], Renderer.of(tokenizer, tools=True))
    assert (found.turns, found.problems) == (4, []) and found.tokens > 100


@pytest.mark.parametrize("seed", range(5))
def test_one_other_token_is_found(seed: int, monkeypatch: pytest.MonkeyPatch):
    random, chosen = Random(seed), Renderer.of(tiny.make_tokenizer("qwen2"), tools=True)
    ((made,),) = chosen.renders([CALLS])  # type: ignore[misc]
    ids, mask = list(made.ids), list(made.mask)
    if seed % 2:
        place = random.randrange(mask.index(True))
        ids[place] += 1
    else:
        place = mask.index(True)
        mask[place] = False
    monkeypatch.setattr(chosen, "renders", lambda rows, train_on: [[replace(made, ids=ids, mask=mask)]])
    found = check([CALLS], chosen)
    assert len(found.problems) == (3 if seed % 2 else 1)
    assert (f"token {place} of" if seed % 2 else "is not trained") in found.problems[0]


def test_words_that_the_template_leaves_out_are_found(rows: Path, model: Path, tmp_path: Path, capsys: Any):
    template = tmp_path / "cut.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | replace('您好', '') }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        encoding="utf-8",
    )
    assert call([str(rows), "--model", str(model), "--check"], capsys)[0] == 0
    words = [str(rows), "--model", str(model), "--check", "--chat-template", str(template), "--json"]
    code, out, err = call(words, capsys)
    assert code == 2 and "rows.jsonl:1, message 2: the trained tokens read" in err
    assert json.loads(out)["check"]["turns"] == 2 and len(json.loads(out)["check"]["problems"]) == 1
