"""Augmentation: rules keep every call true, replies are believed where they are true, and no key is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.stub import said, serving
from weitiao.cli import main
from weitiao.data.augment import by_rules
from weitiao.data.augment_rules import RULES, numeral, words
from weitiao.data.documents import asked, pieces
from weitiao.data.rewrite import questions, rewritten
from weitiao.data.rows import Call, Chat, Message
from weitiao.data.sources import DataOptions, read
from weitiao.data.truth import differences, place_of, wanted
from weitiao.errors import InputError

KEY = "sk-this-is-secret"


def demo_rows(count: int, seed: int = 0) -> list[Chat]:
    from weitiao.demo.database import Database
    from weitiao.demo.dialogues import dialogues

    return list(dialogues(Database.build(0), "train", count, seed))


def plain(question: str, **arguments: Any) -> Chat:
    result = json.dumps({"hotels": [{"名称": "云海酒店", "电话": "010-1234", "评分": 4.5}]}, ensure_ascii=False)
    return Chat(
        (
            Message("user", question),
            Message("assistant", calls=(Call("search_hotels", arguments),)),
            Message("tool", result, name="search_hotels"),
            Message("assistant", "为您找到云海酒店。"),
        ),
        id="row",
    )


@pytest.mark.parametrize("seed", range(3))
def test_every_new_row_is_true_by_running_its_calls(seed: int):
    from weitiao.demo.tools import toolset

    rows, functions = demo_rows(40, seed), toolset()
    made = by_rules(rows, 3, seed, functions)
    assert len(made.records) > 50 and set(made.used) >= {"facilities", "typos", "goodbye", "follow_up"}
    assert made.records == by_rules(rows, 3, seed, functions).records
    by_group = {row.group: row for row in rows}
    for record in made.records:
        before = by_group[record["group"]]
        calls = [c["function"] for m in record["messages"] for c in m.get("tool_calls", [])]
        old = [call for message in before.messages for call in message.calls]
        assert len(calls) == len(old)
        for new, call in zip(calls, old, strict=True):
            ours, theirs = functions[new["name"]](**new["arguments"]), functions[call.name](**call.arguments)
            assert ours == theirs
        results = [m["content"] for m in record["messages"] if m["role"] == "tool"]
        assert results == [m.content for m in before.messages if m.role == "tool"]


def test_each_rule_by_itself():
    row = plain("请问，有停车场的，400-500元，评分4.5分以上", facilities=["停车场"], price_range_lower=400,
                price_range_upper=500, rating_range_lower=4.5)  # fmt: skip
    for name in ("facilities", "amounts", "order", "homophones", "follow_up", "goodbye", "typos"):
        only = {other: float(other == name) for other in RULES}
        texts = {r["messages"][0]["content"] for s in range(30) for r in by_rules([row], 1, s, None, only).records}
        assert texts, name
        assert name in ("follow_up", "goodbye") or row.messages[0].content not in texts
    made = by_rules([row], 1, 0, None, {name: float(name == "follow_up") for name in RULES}).records[0]["messages"]
    assert made[-1]["content"] in ("云海酒店的电话是010-1234。", "云海酒店的评分是4.5。")
    farewell = {name: float(name == "goodbye") for name in RULES}
    assert len(by_rules([plain(f"找{i}", name=str(i)) for i in range(9)], 1, 0, None, farewell).records) == 9


def test_noise_leaves_values_and_what_is_not_said_literally_alone():
    said = plain("想去能停车的，价格500元以下的酒店", facilities=["停车场"], price_range_upper=500)
    noise = {name: float(name in ("typos", "homophones", "order")) for name in RULES}
    assert not by_rules([said], 5, 0, None, noise).records
    literal = plain("麻烦推荐带停车场的酒店，最好便宜一些", facilities=["停车场"])
    made = by_rules([literal], 20, 0, None, noise).records
    assert made and all("停车场" in record["messages"][0]["content"] for record in made)


def test_a_phrase_belongs_to_one_value():
    phrases = [phrase for some in words()["phrases"].values() for phrase in some]
    assert len(phrases) == len(set(phrases))
    assert not set(phrases) & set(words()["phrases"])


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (400, "四百"),
        (450, "四百五十"),
        (405, "四百零五"),
        (1000, "一千"),
        (1050, "一千零五十"),
        (15, "十五"),
        (10, "十"),
    ],
)
def test_numerals(number: int, said: str):
    assert numeral(number) == said


def test_what_is_not_true_any_more_is_named():
    before = plain("400元以下，有停车场的", price_range_upper=400, facilities=["停车场"])
    lost = Chat((Message("user", "便宜的，有停车场的"), *before.messages[1:]))
    assert differences(before, lost) == ["message 1 no longer says 400"]
    assert differences(before, lost, said={"400": "便宜"}) == []
    other = Chat((before.messages[0], Message("assistant", calls=(Call("search_hotels", {}),)), *before.messages[2:]))
    assert differences(before, other) == ["search_hotels cannot be run here, and has other arguments"]
    assert "another result" in differences(before, other, {"search_hotels": lambda **a: len(a)})[0]
    assert place_of("400", "1400元") == -1 and place_of("4", "4.5分") == -1 and place_of("4.5", "要4.5分。") == 1


@pytest.fixture
def stub() -> Iterator[Any]:
    """A server that says what ``stub.reply`` makes of a prompt, and the prompts that it was ``asked``."""
    found = SimpleNamespace(reply=lambda prompt: "好", asked=[])

    def respond(body: dict[str, Any], _: int) -> tuple[int, dict[str, str], bytes]:
        prompt = body["messages"][-1]["content"]
        found.asked.append(prompt)
        return said(found.reply(prompt))

    with serving(respond) as (found.url, _):
        yield found


CHAT = plain("400元以下，有停车场的", price_range_upper=400, facilities=["停车场"])


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ('["要能停车场，400元封顶"]', ""),
        ('```json\n["停车场得有，价钱别超400元"]\n```', ""),
        ("好的，这就改写。", "not a JSON list"),
        ('["a", "b"]', "2 turns, not 1"),
        ('["400元以下， 有停车场的！"]', "a copy"),
        ('["便宜些，有停车场的"]', "no longer says 400"),
        ('["300到400元，有停车场的"]', "says 300"),
        ('["1400元以下，有停车场的"]', "no longer says 400"),
        ('[" "]', "an empty turn"),
        ('["400元，停车场' + "啊" * 100 + '"]', "characters for"),
    ],
)
def test_which_rewritings_are_believed(reply: str, problem: str):
    made, problems = rewritten(CHAT, reply)
    assert (made is not None) == (not problem) and problem in "; ".join(problems)
    assert made is None or wanted(made) == wanted(CHAT)


def test_the_verb_rewrites_and_keeps_what_it_does_not_believe(stub: Any, tmp_path: Path, capsys: Any, monkeypatch: Any):
    monkeypatch.setenv("MY_KEY", KEY)
    file, output = tmp_path / "rows.jsonl", tmp_path / "new.jsonl"
    rows = [{"question": f"第{i}家几点开门？", "answer": "八点。"} for i in range(6)]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    def reply(prompt: str) -> str:
        number = next(i for i in range(6) if f"第{i}家" in prompt)
        return "抱歉，我不能。" if number == 3 else json.dumps([f"请问第{number}家什么时候开始营业呢？"])

    stub.reply = reply
    command = ["data", "augment", str(file), "--by", "rewrite", "--endpoint", stub.url, "--rewriter", "m"]
    command += ["--key-variable", "MY_KEY", "--output", str(output), "--originals", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["originals"], report["new"], report["rejected"]) == (6, 5, 1)
    assert report["endpoint"]["tokens_out"] == 18
    new = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["group"] for row in new[6:]] == [row["group"] for row in new[:6] if "第3家" not in str(row)]
    assert len(read(output, DataOptions()).rows) == 11
    assert "抱歉" in (tmp_path / "new.rejects.jsonl").read_text(encoding="utf-8")
    asked_before = len(stub.asked)
    assert main([*command, "--overwrite"]) == 0 and len(stub.asked) == asked_before
    assert all(KEY not in path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    capsys.readouterr()
    assert (
        main(
            ["data", "augment", str(file), "--output", str(output), "--overwrite", "--rule", "x=1", "--rule", "typos=2"]
        )
        == 2
    )
    assert capsys.readouterr().err.count("--rule") == 2


MANUAL = """# 手册
## 几点开门？
每天早上八点开门，周一休息。

```
# 不是标题
```
## 退货
七天之内，带上小票就能退货。超过七天不退。

问：可以送货吗？
答：三公里以内免费送货。
"""


def test_documents_are_cut_with_their_places_and_asked_questions_are_found(tmp_path: Path):
    file = tmp_path / "manual.md"
    file.write_text(MANUAL, encoding="utf-8")
    found = list(pieces(file))
    assert [piece.heading for piece in found] == ["手册 > 几点开门？", "手册 > 退货"]
    lines = MANUAL.splitlines()
    assert all(piece.text == "\n".join(lines[piece.lines[0] - 1 : piece.lines[1]]).strip() for piece in found)
    assert [asked(piece)[0][0] for piece in found] == ["几点开门？", "可以送货吗？"]
    long = tmp_path / "long.txt"
    long.write_text("\n\n".join(f"第{i}段" + "字" * 90 for i in range(200)), encoding="utf-8")
    cut = list(pieces(long))
    assert sum(piece.text.count("段") for piece in cut) == 200 and max(len(piece.text) for piece in cut) < 2500


def test_answers_that_the_text_does_not_bear_out_are_rejected(stub: Any, tmp_path: Path, capsys: Any):
    pairs = [
        ("怎么退货？", "七天之内，带上小票就能退货。"),
        ("多少钱？", "退货要付20元。"),
        ("可以换吗？", "不可以换颜色尺码哦亲"),
    ]
    pairs += [("本文说了什么？", "七天之内，带上小票就能退货。"), ("怎么退货", "带上小票就能退货。")]
    reply = json.dumps([{"question": q, "answer": a} for q, a in pairs], ensure_ascii=False)
    good, bad = questions(MANUAL, reply)
    assert good == pairs[:1] and len(bad) == 4
    file, output = tmp_path / "manual.md", tmp_path / "qa.jsonl"
    file.write_text(MANUAL, encoding="utf-8")
    stub.reply = lambda prompt: reply
    words = ["data", "augment", str(file), "--by", "questions", "--output", str(output)]
    assert main([*words, "--endpoint", stub.url]) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert {row["prompt"] for row in rows} >= {"几点开门？", "可以送货吗？", "怎么退货？"}
    assert all(row["source"]["file"] == str(file) and row["source"]["lines"] for row in rows)
    assert len(read(output, DataOptions()).rows) == len(rows)
    pdf = tmp_path / "x.pdf"
    pdf.write_bytes(b"%PDF")
    capsys.readouterr()
    assert main(["data", "augment", str(pdf), "--by", "questions", "--output", str(output), "--overwrite"]) == 2
    assert "pdf" in capsys.readouterr().err.lower()


def pdf(*pages: str) -> bytes:
    """A PDF with these words on its pages, written by hand as its specification has it."""
    streams = [f"BT /F1 12 Tf 20 100 Td ({words}) Tj ET".encode() for words in pages]
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Count {len(pages)}/Kids[{kids}]>>".encode(),
               b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]  # fmt: skip
    for number, stream in enumerate(streams):
        page = f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 200]/Contents {5 + 2 * number} 0 R"
        objects.append(f"{page}/Resources<</Font<</F1 3 0 R>>>>>>".encode())
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream))
    body, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    end = b"xref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF"
    return body + end % (size, table, size, len(body))


def test_a_pdf_is_read_page_by_page_or_says_what_is_missing(tmp_path, monkeypatch):
    file = tmp_path / "manual.pdf"
    file.write_bytes(pdf("Breakfast is from seven.", "", "The pool is closed."))
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(InputError, match=r"pip install .weitiao\[pdf\]"):
        list(pieces(file))
    monkeypatch.delitem(sys.modules, "pypdf")
    pytest.importorskip("pypdf")
    found = [(piece.text, piece.heading, piece.lines) for piece in pieces(file)]
    assert found == [("Breakfast is from seven.", "page 1", (1, 1)), ("The pool is closed.", "page 3", (1, 1))]
    file.write_bytes(pdf(""))
    with pytest.raises(InputError, match="no text"):
        list(pieces(file))
    file.write_bytes(b"%PDF-1.4 and then nothing")
    with pytest.raises(InputError, match="not a PDF"):
        list(pieces(file))
