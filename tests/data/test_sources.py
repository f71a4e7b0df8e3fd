"""Sources: what each layout and format becomes, and that everything wrong is said at once with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weitiao.config import build
from weitiao.data.layouts import fill, template_slots
from weitiao.data.rows import Call, Chat, Message, Row, Text, text_of
from weitiao.data.sources import DataOptions, Source, arguments, load, read, read_all
from weitiao.errors import InputError

ASK, ANSWER = Message("user", "问"), Message("assistant", "答")
USER, ASSISTANT = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
CALL = Call("search", {"area": "北京", "price": 400})
SCHEMA = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
CALLED = (ASK, Message("assistant", calls=(CALL,)), Message("tool", "[]", name="search"), ANSWER)


def write(path: Path, *records: Any) -> Path:
    lines = (record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def options(**values: Any) -> DataOptions:
    return build(DataOptions, values)


def read_rows(tmp_path: Path, *records: Any, **values: Any) -> Source:
    return read(write(tmp_path / "rows.jsonl", *records), options(**values))


def problems(tmp_path: Path, *records: Any, **values: Any) -> list[str]:
    with pytest.raises(InputError) as error:
        read_rows(tmp_path, *records, **values)
    return error.value.problems


def only(source: Source) -> Row:
    (row,) = source.rows
    return row


def messages_of(source: Source) -> tuple[Message, ...]:
    row = only(source)
    assert isinstance(row, Chat)
    return row.messages


# ---- layouts ---------------------------------------------------------------------------------------------------------

TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": json.dumps(CALL.arguments)}}
LAYOUTS = {
    "messages": ({"messages": [USER, ASSISTANT]}, (ASK, ANSWER)),
    "messages with a system": (
        {"messages": [{"role": "system", "content": "礼貌"}, USER, ASSISTANT, USER, ASSISTANT]},
        (Message("system", "礼貌"), ASK, ANSWER, ASK, ANSWER),
    ),
    "messages, a call as OpenAI writes it": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "[]"},
                ASSISTANT,
            ],
            "tools": [SCHEMA],
        },
        CALLED,
    ),
    "messages, arguments as an object": (
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{"name": "search", "arguments": dict(CALL.arguments)}]},
                {"role": "tool", "name": "search", "content": []},
                ASSISTANT,
            ]
        },
        (*CALLED[:2], Message("tool", "", name="search"), ANSWER),
    ),
    "messages, the old function_call": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "", "function_call": TOOL_CALL["function"]},
                {"role": "function", "name": "search", "content": "[]"},
                ASSISTANT,
            ],
            "functions": [SCHEMA["function"]],
        },
        CALLED,
    ),
    "messages, content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "问"}]}, ASSISTANT]},
        (ASK, ANSWER),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "system": "礼貌"},
        (Message("system", "礼貌"), ASK, ANSWER),
    ),
    "messages with text": (
        {"messages": [{"role": r, "text": x} for r, x in (("user", "问"), ("bot", "答"))]},
        (ASK, ANSWER),
    ),
    "sharegpt with OpenAI's names": ({"conversations": [USER, ASSISTANT]}, (ASK, ANSWER)),
    "sharegpt with a call": (
        {
            "conversations": [
                {"from": "human", "value": "问"},
                {"from": "function_call", "value": json.dumps({"name": "search", "arguments": dict(CALL.arguments)})},
                {"from": "observation", "value": "[]"},
                {"from": "gpt", "value": "答"},
            ],
            "tools": json.dumps([SCHEMA["function"]]),
        },
        CALLED,
    ),
    "sharegpt, words and a call": (
        {
            "conversations": [
                {"from": "human", "value": "问"},
                {"from": "gpt", "value": "我查一下"},
                {"from": "function_call", "value": json.dumps({"name": "search", "arguments": {}})},
                {"from": "observation", "value": "[]"},
                {"from": "gpt", "value": "答"},
            ]
        },
        (ASK, Message("assistant", "我查一下", (Call("search", {}),)), Message("tool", "[]", name="search"), ANSWER),
    ),
    "alpaca": ({"instruction": "问", "input": "", "output": "答"}, (ASK, ANSWER)),
    "alpaca with input, system, history": (
        {"instruction": "问", "input": "北京", "output": "答", "system": "礼貌", "history": [["一", "二"]]},
        (
            Message("system", "礼貌"),
            Message("user", "一"),
            Message("assistant", "二"),
            Message("user", "问\n北京"),
            ANSWER,
        ),
    ),
    "prompt and completion": ({"prompt": "问", "completion": "答"}, (ASK, ANSWER)),
    "prompt and completion as messages": ({"prompt": [USER], "completion": [ASSISTANT]}, (ASK, ANSWER)),
    "question and answer": ({"question": "问", "answer": "答"}, (ASK, ANSWER)),
    "Chinese names": ({"问题": "问", "答案": "答"}, (ASK, ANSWER)),
    "a number as answer": ({"question": "问", "answer": 4.5}, (ASK, Message("assistant", "4.5"))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_found_and_read(name: str, tmp_path: Path):
    record, expected = LAYOUTS[name]
    source = read_rows(tmp_path, record)
    assert messages_of(source) == expected
    assert f"{tmp_path / 'rows.jsonl'}: {source.format} (from the key " in source.said[0]


def test_text_rows_keep_their_text(tmp_path: Path):
    source = read_rows(tmp_path, {"text": " 你好\n世界 ", "id": "x7", "group": 3})
    assert source.rows == [Text(" 你好\n世界 ", "x7", "3")]
    assert source.format == "text"


def test_a_row_is_named_by_its_line_and_keeps_its_group(tmp_path: Path):
    rows = read_rows(tmp_path, {"text": "a"}, "", {"text": "b", "group": "g"}).rows
    assert [(row.id, row.group) for row in rows] == [
        (f"{tmp_path / 'rows.jsonl'}:1", None),
        (f"{tmp_path / 'rows.jsonl'}:3", "g"),
    ]


def test_tools_are_wrapped_and_given_to_rows_without(tmp_path: Path):
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([SCHEMA["function"]]), encoding="utf-8")
    own = {"name": "own", "parameters": {}}
    record = {"messages": [USER, ASSISTANT]}
    rows = read_rows(tmp_path, record, record | {"tools": [own]}, tools=str(tools)).rows
    assert [row.tools for row in rows if isinstance(row, Chat)] == [
        (SCHEMA,),
        ({"type": "function", "function": own},),
    ]
    for wrong in ("{", "[]", "[3]"):
        tools.write_text(wrong, encoding="utf-8")
        with pytest.raises(InputError, match=r"data\.tools"):
            read_rows(tmp_path, record, tools=str(tools))


def test_parallel_calls_take_their_names_by_id_and_by_place(tmp_path: Path):
    calls = [{"id": f"c{i}", "function": {"name": name, "arguments": ""}} for i, name in enumerate("ab")]
    by_id = [{"role": "tool", "tool_call_id": f"c{i}", "content": str(i)} for i in (1, 0)]
    by_place = [{"role": "tool", "content": str(i)} for i in (0, 1)]
    for results, names in ((by_id, ["b", "a"]), (by_place, ["a", "b"])):
        record = {"messages": [USER, {"role": "assistant", "tool_calls": calls}, *results, ASSISTANT]}
        assert [m.name for m in messages_of(read_rows(tmp_path, record)) if m.role == "tool"] == names


def test_keys_that_nothing_is_made_of_are_said(tmp_path: Path):
    source = read_rows(tmp_path, {"messages": [USER | {"weight": 0}, ASSISTANT], "source": "web"})
    assert source.said[1].endswith("keys not used: source, weight")


# ---- columns and templates -------------------------------------------------------------------------------------------


def test_columns_map_a_files_own_names(tmp_path: Path):
    record = {"题": "问", "解": "答", "text": "不是它", "组": "g1"}
    source = read_rows(tmp_path, record, columns={"prompt": "题", "answer": "解", "group": "组"})
    assert messages_of(source) == (ASK, ANSWER)
    assert only(source).group == "g1"
    assert "(from the key '题')" in source.said[0]


def test_a_template_fills_its_slots(tmp_path: Path):
    record = {"question": "哪个", "options": ["甲", "乙"], "答": "甲", "n": 2}
    template = "问：{question}\n请从{options}中选{n}个。{{}}"
    source = read_rows(tmp_path, record, template=template, columns={"answer": "答"})
    assert messages_of(source)[0].content == '问：哪个\n请从["甲", "乙"]中选2个。{}'
    assert messages_of(source)[1].content == "甲"


def test_missing_slots_and_columns_are_errors(tmp_path: Path):
    template = {"template": "问：{question}{options}", "columns": {"answer": "答"}}
    (first, second, _) = problems(tmp_path, {"question": "哪个", "答": "甲"}, {"question": "哪个"}, **template)
    assert "slot options has no value; keys of the row: question, answer" in first
    assert "no column 答 (data.columns.answer); the row has question" in second
    assert "no row has the column 组 (data.columns.group)" in str(
        problems(tmp_path, {"text": "a"}, columns={"group": "组"})
    )


@pytest.mark.parametrize("template", ["{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{a", "no slot", "{a} {}"])
def test_malformed_templates_are_refused(template: str):
    with pytest.raises(InputError):
        options(template=template)


def test_slots_may_have_any_name():
    assert template_slots("{a b}{问-题}") == ["a b", "问-题"]
    assert fill("{a b}{问-题}", {"a b": "1", "问-题": 2}) == "12"


def test_unknown_options_are_refused():
    for values in ({"columns": {"promt": "x"}}, {"format": "xml"}, {"validation": 1.5}, {"max_length": 0}):
        with pytest.raises(InputError):
            options(**values)
    with pytest.raises(InputError, match="nothing to train on"):
        options(validation=0.5, test=0.5)
    assert options(validation="0.25").validation == 0.25
    assert options(validation="held.jsonl").validation == "held.jsonl"


# ---- bad rows --------------------------------------------------------------------------------------------------------

BAD = {
    "user after user": ({"messages": [USER, USER, ASSISTANT]}, "message 2: role user after user, expected assistant"),
    "assistant first": ({"messages": [ASSISTANT]}, "message 1: role assistant at the start"),
    "assistant twice": ({"messages": [USER, ASSISTANT, ASSISTANT]}, "role assistant after assistant, expected user"),
    "system in between": (
        {"messages": [USER, {"role": "system", "content": "x"}, ASSISTANT]},
        "role system after user",
    ),
    "tool without a call": ({"messages": [USER, {"role": "tool", "content": "x"}, ASSISTANT]}, "role tool after user"),
    "a result too many": (
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [TOOL_CALL]},
                *[{"role": "tool", "content": "x"}] * 2,
                ASSISTANT,
            ]
        },
        "message 4: role tool after tool, expected assistant",
    ),
    "a call without a result": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [TOOL_CALL]}, USER, ASSISTANT]},
        "role user after assistant, expected tool",
    ),
    "no answer": ({"messages": [USER]}, "ends with user"),
    "empty answer": ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "message 2: empty answer"),
    "null answer": ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2: content: found null"),
    "no content": (
        {"messages": [USER, {"role": "assistant", "words": "x"}]},
        "no content: the keys of the message are",
    ),
    "empty question": ({"messages": [{"role": "user", "content": ""}, ASSISTANT]}, "message 1: empty question"),
    "unknown role": ({"messages": [{"role": "narrator", "content": "x"}]}, 'unknown role "narrator"; known: system'),
    "no role": ({"messages": [{"content": "x"}]}, "unknown role null"),
    "no messages": ({"messages": []}, "expected a list of messages"),
    "messages null": ({"messages": None}, "messages: found null, expected a value"),
    "not an object": ([1], "found [1], expected an object"),
    "a turn that is none": ({"messages": ["x"]}, 'message 1: found "x"'),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]}, "only text parts"),
    "arguments that are no JSON": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}]},
        "expected JSON",
    ),
    "arguments that are a list": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]},
        "arguments of f: expected an object",
    ),
    "a call by the user": ({"messages": [USER | {"tool_calls": [TOOL_CALL]}, ASSISTANT]}, "a call by user"),
    "an unknown tool": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [TOOL_CALL]}], "tools": [{"name": "other"}]},
        "calls search, which is not among its tools (other)",
    ),
    "tools that are none": ({"messages": [USER, ASSISTANT], "tools": "x"}, "tools: expected JSON"),
    "another layout": ({"text": "x"}, "of layout text (from the key 'text') in a file of messages; give each"),
    "no layout": ({"spam": "x"}, "not of layout messages (keys messages): its keys are spam"),
    "not JSON": ("{'messages': 1}", "not JSON"),
    "NaN": ('{"messages": NaN}', "NaN is not JSON"),
    "half a character": ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a character"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_and_can_be_left_out(name: str, tmp_path: Path):
    record, reason = BAD[name]
    good = {"messages": [USER, ASSISTANT]}
    found = problems(tmp_path, good, record, good)
    assert len(found) == 2
    assert found[0].startswith(f"{tmp_path / 'rows.jsonl'}:2: ") and reason in found[0]
    assert "1 of 3 rows are bad" in found[1] and "--skip-bad" in found[1]
    source = read_rows(tmp_path, good, record, good, skip_bad=True)
    assert len(source.rows) == 2 and len(source.bad) == 1 and source.lines == [1, 3]
    assert source.said[-2].endswith("1 bad row left out, 2 kept")
    assert "1 × " in source.said[-1] and source.said[-1].endswith("rows.jsonl:2)")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "问", "output": ""}, "output: empty answer"),
        ({"instruction": "问", "input": None, "output": None}, "1: output: found null"),
        ({"question": "问", "answer": None, "source": None}, "1: answer: found null"),
        ({"question": None, "answer": "答"}, "1: question: found null"),
        ({"instruction": " ", "output": "答"}, "instruction: empty"),
        ({"question": "问", "answer": " "}, "answer: empty answer"),
        ({"question": {"a": 1}, "answer": "答"}, "question: expected text"),
        ({"question": "问", "answer": "答", "history": [["一"]]}, "history: expected"),
        ({"text": "  "}, "text: empty"),
    ],
)
def test_empty_cells_are_named(record: dict, reason: str, tmp_path: Path):
    assert reason in problems(tmp_path, record)[0]


def test_twenty_bad_rows_are_listed_and_of_more_the_first_of_every_reason(tmp_path: Path):
    assert len(problems(tmp_path, {"text": "x"}, *["nonsense"] * 20)) == 21
    *lines, last = problems(tmp_path, {"text": "x"}, *["nonsense"] * 30, {"text": ""}, {"prompt": "a", "answer": "b"})
    assert [line.partition("rows.jsonl:")[2].partition(":")[0] for line in lines] == ["2", "3", "4", "", "32", "33"]
    assert lines[3] == "… and 27 more of this kind" and last.startswith("32 of 33 rows are bad")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "answer": "b",}', "a comma before the closing } at column 31"),
        ('{"messages": [1, ]}', "a comma before the closing ]"),
        ("{'prompt': 'a'}", "single quotes; JSON has double ones"),
        ('{"prompt": “a”}', "the quotation mark “"),
        ('{"prompt": None}', "None; JSON writes null"),
        ('{prompt: "a"}', "a key in double quotes is missing"),
        ('{"prompt": "a" "answer": "b"}', "a comma is missing"),
        ('{"prompt": "say "a" now"}', "a comma is missing, or a"),
        ('{"prompt" "a"}', "a colon is missing"),
        ('{"prompt": "a"', "it breaks off"),
        ('{"prompt": ', "it breaks off"),
        ('{"prompt": "a', "a text that begins here does not end at column 12"),
        ('{"prompt": "a\tb"}', "a tab or line break"),
        ('{"prompt": "C:\\dir"}', "a backslash"),
        ('{"a": 1} {"b": 2}', "more stands behind its end"),
    ],
)
def test_what_is_no_json_is_told_in_our_own_words(line: str, said: str, tmp_path: Path):
    assert said in problems(tmp_path, {"prompt": "a", "answer": "b"}, line)[0]


def test_a_number_for_an_answer_is_taken_and_said(tmp_path: Path):
    source = read_rows(tmp_path, {"prompt": "2 + 3?", "answer": 5}, {"prompt": "a", "answer": "b"})
    assert isinstance(row := source.rows[0], Chat) and row.messages[1].content == "5"
    assert any(line.endswith("numbers taken for text: answer") for line in source.said)
    slots = DataOptions(template="{price}?")
    (tmp_path / "rows.jsonl").write_text('{"price": 5, "answer": "b"}')
    assert not any("numbers" in line for line in read(tmp_path / "rows.jsonl", slots).said)


def test_rows_left_out_are_counted_by_reason_and_the_first_of_each_named(tmp_path: Path):
    source = read_rows(tmp_path, {"text": "x"}, *["nonsense"] * 5, {"text": ""}, skip_bad=True)
    file, counted = tmp_path / "rows.jsonl", source.said[-2:]
    said = 'not JSON: expected a value, found "nonsense" at column 1'
    assert counted[0] == f"  5 × {said} ({file}:2, {file}:3, {file}:4, …)"
    assert counted[1] == f"  1 × text: empty ({file}:7)"


ONE_OF_EACH = {
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
    "alpaca": {"instruction": "问", "input": "北京", "output": "答"},
    "prompt": {"question": "问", "answer": "答"},
    "text": {"text": "文"},
}


@pytest.mark.parametrize("layout", ONE_OF_EACH)
@pytest.mark.parametrize("nulls", [False, True], ids=["keys of its own", "a table's nulls"])
def test_rows_of_another_layout_are_named_whichever_is_first(layout: str, nulls: bool, tmp_path: Path):
    """With ``nulls`` every row has every key, as the rows of a table do, and those of other layouts are null."""
    others = [name for name in ONE_OF_EACH if name != layout]
    empty = {key: None for record in ONE_OF_EACH.values() for key in record} if nulls else {}
    records = [empty | record for record in (*[ONE_OF_EACH[layout]] * 3, *(ONE_OF_EACH[name] for name in others))]
    *found, last = problems(tmp_path, *records)
    assert last.startswith("4 of 7 rows are bad")
    for line, other, problem in zip(range(4, 8), others, found, strict=True):
        assert f"rows.jsonl:{line}: of layout {other} (" in problem and f"in a file of {layout};" in problem
    source = read_rows(tmp_path, *records, skip_bad=True)
    assert len(source.rows) == 3 and len(source.bad) == 4


def test_nothing_left_is_an_error_even_with_skip_bad(tmp_path: Path):
    assert "nothing would be left" in problems(tmp_path, "nonsense", skip_bad=True)[-1]


def test_the_majority_of_the_first_rows_decides(tmp_path: Path):
    source = read_rows(tmp_path, {"text": "x"}, *[{"question": "问", "answer": "答"}] * 3, skip_bad=True)
    assert source.format == "prompt" and len(source.rows) == 3


def test_unknown_layouts_name_the_keys(tmp_path: Path):
    (found,) = problems(tmp_path, {"spam": 1, "eggs": 2})
    assert "spam, eggs" in found and "data.columns={prompt: ..., answer: ...}" in found
    (found,) = problems(tmp_path, {"Question": "问", " ANSWER": "答"})
    assert "data.columns={prompt: Question, answer:  ANSWER}" in found


# ---- formats ---------------------------------------------------------------------------------------------------------


def saved(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_arrays_lines_bom_and_crlf(name: str, tmp_path: Path):
    array = saved(tmp_path / name, b"\xef\xbb\xbf" + ' [\r\n{"text": "a"},\r\n\r\n{"text": "中"}\r\n]\r\n'.encode())
    assert [(row.id.rpartition(":")[2], text_of(row)) for row in read(array, options()).rows] == [
        ("2", "a"),
        ("4", "中"),
    ]
    lines = saved(tmp_path / name, b"\xef\xbb\xbf" + '{"text": "a"}\r\n\r\n{"text": "中"}\r\n'.encode())
    assert [(row.id.rpartition(":")[2], text_of(row)) for row in read(lines, options()).rows] == [
        ("1", "a"),
        ("3", "中"),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"text": "a"},\n{"text": "b"}', ":2: the JSON array breaks off"),
        ('[{"text": "a"}\n{"text": "b"}]', ":2: the JSON array breaks off: expected a comma"),
        ('[{"text": "a"},\n{"text": ]', ":2: the JSON array breaks off"),
        ('[{"text": "a"}]\n x', "more text behind"),
        ("[]", "no rows"),
        ('{\n "text": "a"\n}\n{\n "text": "b"\n}', ":1: an object goes on over several lines"),
        ('{"data": [{"text": "a"}], "version": 1}', "whose key data holds a list"),
    ],
)
def test_broken_arrays_are_refused(text: str, reason: str, tmp_path: Path):
    with pytest.raises(InputError) as error:
        read(saved(tmp_path / "rows.json", text), options(skip_bad=True))
    assert reason in str(error.value)


@pytest.mark.parametrize(("name", "cut"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_tables(name: str, cut: str, tmp_path: Path):
    text = f'\ufeffquestion{cut}answer\r\n"多\r\n行 ""引号""{cut}"{cut}一\r\n\r\n二{cut}三\r\n'
    source = read(saved(tmp_path / name, text), options())
    first, second = source.rows
    assert isinstance(first, Chat) and isinstance(second, Chat)
    assert [m.content for m in first.messages] == [f'多\r\n行 "引号"{cut}', "一"]
    assert source.lines == [2, 5]


@pytest.mark.parametrize(("name", "cut"), [("rows.csv", ";"), ("rows.csv", "\t"), ("rows.csv", "|"), ("rows.tsv", ",")])
def test_another_separator_is_found_and_said(name: str, cut: str, tmp_path: Path):
    file = saved(tmp_path / name, f'question{cut}answer\n"你好, 请问"{cut}"一{cut}二"\n')
    source = read(file, options())
    (row,) = source.rows
    assert isinstance(row, Chat) and [m.content for m in row.messages] == ["你好, 请问", f"一{cut}二"]
    assert f"{file}: its cells are separated by {json.dumps(cut)}" in source.said


def test_bad_lines_of_a_table(tmp_path: Path):
    good = "question,answer\n一,二\n"
    data = good.encode() + b"\xc4\xe3,x\n" + "一\n一,二,三\n一,\n一,二\n".encode()
    with pytest.raises(InputError) as error:
        read(saved(tmp_path / "rows.csv", data), options())
    lines = [problem.partition("rows.csv:")[2] for problem in error.value.problems[:-1]]
    assert [line.split(":")[0] for line in lines] == ["3", "4", "5", "6"]
    assert "0xc4" in lines[0] and "1 cell, the header has 2" in lines[1] and "empty answer" in lines[3]
    assert len(read(tmp_path / "rows.csv", options(skip_bad=True)).rows) == 2
    for text in ("question,question\n1,2\n", '"', "\n\n", good + '一,"二\n三,四\n'):
        with pytest.raises(InputError):
            read(saved(tmp_path / "rows.csv", text), options(skip_bad=True))


def test_a_cell_may_be_long(tmp_path: Path):
    text = "字" * 300_000
    assert text_of(only(read(saved(tmp_path / "rows.csv", f"text\n{text}\n"), options()))) == text


def test_messages_in_a_csv_cell(tmp_path: Path):
    import csv

    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["messages", "tools"], [json.dumps([USER, ASSISTANT]), ""]])
    assert messages_of(read(tmp_path / "rows.csv", options())) == (ASK, ANSWER)


def test_parquet(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"messages": [USER, ASSISTANT]}, {"messages": [USER]}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    source = read(tmp_path / "rows.parquet", options(skip_bad=True))
    assert messages_of(source) == (ASK, ANSWER)
    assert source.bad[0].where.endswith("rows.parquet:2")
    with pytest.raises(InputError, match="not a parquet file"):
        read(saved(tmp_path / "bad.parquet", b"PAR1 not really PAR1"), options())


def test_a_parquet_file_that_is_damaged_is_no_surprise(tmp_path: Path):
    """Bytes of a sound file turned over anywhere, and its end cut off: its rows, or one clear error."""
    import random

    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"问{i}", "answer": f"答{i % 7}"} for i in range(300)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "sound.parquet", row_group_size=50)
    sound, draw = (tmp_path / "sound.parquet").read_bytes(), random.Random(0)
    refused = 0
    for number in range(40):
        broken = bytearray(sound)
        start = draw.randrange(len(sound))
        broken[start : start + 30] = draw.randbytes(30)
        file = saved(tmp_path / "broken.parquet", bytes(broken[: start + 30]) if number % 4 == 0 else bytes(broken))
        try:
            read(file, options(skip_bad=True))
        except InputError as error:
            refused += all(problem.startswith(str(tmp_path)) or "rows are bad" in problem for problem in error.problems)
    assert refused > 20


def test_text_files(tmp_path: Path):
    source = read(saved(tmp_path / "a.txt", "一\r\n \n二"), options())
    assert [text_of(row) for row in source.rows] == ["一", "二"]
    assert source.said == [f"{tmp_path / 'a.txt'}: text, one row a line"]


def test_bytes_that_are_not_utf8_are_placed(tmp_path: Path):
    data = '{"text": "一"}\n{"text": "'.encode() + "二".encode("gbk") + b'"}\n'
    with pytest.raises(InputError, match=r"rows\.jsonl:2: not UTF-8: byte 0xb6 at column 11"):
        read(saved(tmp_path / "rows.jsonl", data), options())
    assert len(read(tmp_path / "rows.jsonl", options(skip_bad=True)).rows) == 1
    with pytest.raises(InputError, match=r"rows\.json:2: not UTF-8"):
        read(saved(tmp_path / "rows.json", b"[\n" + '"二"]'.encode("gbk")), options())
    with pytest.raises(InputError, match="UTF-16"):
        read(saved(tmp_path / "rows.txt", "一".encode("utf-16")), options())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
@pytest.mark.parametrize("encoding", ["gbk", "gb18030"])
def test_a_file_in_gbk_is_told_by_its_name_and_how_to_convert_it(name: str, encoding: str, tmp_path: Path):
    rows = [{"问题": f"你们{i}点开门？", "答案": "早上八点。"} for i in range(3)]
    texts = {
        "rows.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "rows.json": json.dumps(rows, ensure_ascii=False, indent=1),
        "rows.csv": "问题,答案\n你们几点开门？,八点。\n",
        "rows.txt": "你们几点开门？\n早上八点。\n",
    }
    file = saved(tmp_path / name, texts[name].encode(encoding))
    with pytest.raises(InputError) as error:
        read(file, options())
    command = f"iconv -f GB18030 -t UTF-8 {file} > {file.with_stem('rows.utf8')}"
    assert "GBK, not UTF-8" in str(error.value) and command in str(error.value)
    assert "GBK" not in str(not_utf8(saved(file, "café, naïve, coöperate\n".encode("latin-1"))))


def not_utf8(file: Path) -> InputError:
    with pytest.raises(InputError, match="not UTF-8") as error:
        read(file, options(format="txt"))
    return error.value


def test_files_that_are_none(tmp_path: Path):
    for path, reason in (
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path, "is a folder"),
        (saved(tmp_path / "empty.jsonl", ""), "is empty"),
        (saved(tmp_path / "blank.jsonl", "\n \n"), "no rows"),
        (saved(tmp_path / "rows.docx", "PK"), "unknown kind of file"),
    ):
        with pytest.raises(InputError, match=reason):
            read(path, options())
    assert text_of(only(read(saved(tmp_path / "rows.data", '{"text": "a"}'), options(format="jsonl")))) == "a"


# ---- load ------------------------------------------------------------------------------------------------------------


def questions(path: Path, count: int, start: int = 0) -> str:
    return str(write(path, *({"question": f"问{i}", "answer": "答"} for i in range(start, start + count))))


def test_load_shares_by_group_and_loses_nothing(tmp_path: Path):
    names = [questions(tmp_path / "a.jsonl", 60), questions(tmp_path / "b.jsonl", 40, 60)]
    splits = load(options(train=names, validation=0.2, test=0.1), "sft", seed=1)
    ids = [row.id for part in (splits.train, splits.validation, splits.test) for row in part]
    assert len(ids) == len(set(ids)) == 100
    assert splits.validation and splits.test and len(splits.said) == 2
    assert splits == load(options(train=names, validation=0.2, test=0.1), "sft", seed=1)
    assert splits.validation != load(options(train=names, validation=0.2), "sft", seed=2).validation


def test_load_takes_files_for_the_parts(tmp_path: Path):
    train, held = questions(tmp_path / "a.jsonl", 20), questions(tmp_path / "b.jsonl", 5, 90)
    splits = load(options(train=train, validation=held, test=0.25), "sft")
    assert len(splits.validation) == 5 and len(splits.train) + len(splits.test) == 20 and splits.test
    assert not load(options(train=train, validation=None), "sft").validation
    assert not load(options(train=train, validation=0), "sft").validation


def test_load_tells_the_problems_of_all_files(tmp_path: Path):
    first, second = write(tmp_path / "a.jsonl", {"text": "x"}, "bad"), write(tmp_path / "b.jsonl", {"text": "x"}, "bad")
    with pytest.raises(InputError) as error:
        load(options(train=[str(first), "none.jsonl"], validation=str(second)), "pretrain")
    text = str(error.value)
    assert "a.jsonl:2" in text and "b.jsonl:2" in text and "none.jsonl: no such file" in text and "2 of 4 rows" in text


def test_load_generates(tmp_path: Path):
    generators = {"corpus": lambda seed: (Text(f"{seed} {i}", str(i)) for i in range(30))}
    splits = load(options(train="generate:corpus"), "pretrain", generators=generators, seed=7)
    assert len(splits.train) + len(splits.validation) == 30 and splits.train[0].text.startswith("7 ")  # type: ignore[union-attr]
    with pytest.raises(InputError, match="generate:corpus"):
        load(options(train="generate:corpsu"), "pretrain", generators=generators)


def test_load_refuses_what_the_task_cannot_use(tmp_path: Path):
    text = str(write(tmp_path / "a.jsonl", {"text": "x"}))
    with pytest.raises(InputError, match="is plain text"):
        load(options(train=text), "sft")
    with pytest.raises(InputError, match="names nothing"):
        load(options(), "sft")


def test_one_row_is_trained_on_and_the_empty_validation_said(tmp_path: Path):
    splits = load(options(train=questions(tmp_path / "a.jsonl", 1)), "sft")
    assert len(splits.train) == 1 and "validation: none: the 1 row" in splits.said[-1]


def test_rows_that_say_the_same_are_told(tmp_path: Path):
    file = str(write(tmp_path / "a.jsonl", *[{"question": "问", "answer": "答"}] * 4))
    splits = load(options(train=file), "sft")
    assert len(splits.train) == 4
    assert f"exact duplicates: 3 training rows, first {file}:2 = {file}:1; to leave them out" in splits.said[1]
    assert "validation: none: the 4 rows are too few to share (1 where" in splits.said[2]
    assert "data.validation=FILE" in splits.said[2]
    other = questions(tmp_path / "b.jsonl", 30)
    said = load(options(train=[other, file], validation=questions(tmp_path / "c.jsonl", 3)), "sft").said
    assert not any("exact duplicates" in line for line in load(options(train=other, validation=other), "sft").said)
    assert sum("exact duplicates" in line and f"{file}:2 = {file}:1" in line for line in said) == 1
    generators = {"twice": lambda seed: [Text("x")] * 9}
    assert not load(options(train="generate:twice"), "pretrain", generators=generators).said[:-1]


def test_words_of_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a=b.jsonl", {"题": "问", "answer": "答"})
    files, found = arguments(["a=b.jsonl", "data.columns.prompt=题", "train_on=last"], skip_bad=True)
    assert files == ["a=b.jsonl"] and found.train_on == "last" and found.skip_bad
    assert len(read_all(files, found)[0].rows) == 1


def test_text_of_writes_calls_as_json():
    assert text_of(Chat(CALLED)) == '问\n{"name": "search", "arguments": {"area": "北京", "price": 400}}\n[]\n答'


def test_a_record_among_prompts_that_would_lose_its_input_is_named(tmp_path: Path):
    rows = [{"prompt": f"几点{number}？", "answer": "八点"} for number in range(3)]
    lost = {"instruction": "翻译", "input": "早上好", "output": "Good morning"}
    (problem,) = problems(tmp_path, *rows, lost)[:1]
    assert ":4: of layout alpaca (" in problem and "in a file of prompt" in problem
