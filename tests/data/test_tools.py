"""Tools: calls written and read, broken ones named and not repaired, arguments checked, functions described."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weitiao.data.rows import Call
from weitiao.data.tools import SYNTAXES, check, detect, format_call, format_calls, parse_calls, schema_of
from weitiao.errors import InputError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(min_size=1, max_size=8), JSON, max_size=3)
NAMES = st.sampled_from(["search_hotels", "get.weather", "查酒店", "f", "a-b"])
CALLS = st.lists(st.builds(Call, NAMES, ARGUMENTS), min_size=1, max_size=3)


@pytest.mark.parametrize("syntax", SYNTAXES)
@given(calls=CALLS)
def test_what_is_written_is_read_back(syntax: str, calls: list[Call]):
    if syntax in ("glm", "chatglm3") and "<|assistant|>" in str(calls):
        return
    parsed = parse_calls(format_calls(calls, syntax), syntax)
    assert (parsed.calls, parsed.content, parsed.problems) == (tuple(calls), "", ())


@pytest.mark.parametrize("syntax", [*SYNTAXES, None])
@pytest.mark.parametrize("text", ["您好，请问有什么可以帮您？", "a < b and {x}", "1. one\n2. two", "", "Note\nthis"])
def test_words_are_words(syntax: str | None, text: str):
    parsed = parse_calls(f"  {text}\n", syntax)
    assert (parsed.content, parsed.calls, parsed.problems) == (text, (), ())


@given(st.text(alphabet='<tool_call>/{}"nameargu:, \n[]TOLCAS', max_size=80), st.sampled_from(list(SYNTAXES)))
def test_any_text_is_read_without_an_exception(text: str, syntax: str):
    parse_calls(text, syntax)


def test_words_around_calls_stay_and_blanks_do_not_matter():
    text = '好的。\n<tool_call>  \n\n{ "name" :"f" , "arguments": {"a": "</tool_call>"} }</tool_call> 请稍等 '
    text += '<tool_call>{"name":"g","arguments":{}}\n\n</tool_call>'
    parsed = parse_calls(text, "hermes")
    assert parsed.calls == (Call("f", {"a": "</tool_call>"}), Call("g", {}))
    assert parsed.content.split() == ["好的。", "请稍等"]
    parsed = parse_calls('我查一下[TOOL_CALLS]  [ {"name": "f", "arguments": {}, "id": "call00000"} ]', "mistral")
    assert (parsed.content, parsed.calls) == ("我查一下", (Call("f", {}),))
    parsed = parse_calls(
        '<|python_tag|>{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}', "llama3"
    )
    assert parsed.calls == (Call("f", {"x": 1}), Call("g", {}))
    parsed = parse_calls("\n 请稍等<|assistant|>f\n ```python\ntool_call(x='一', y=[1, true], z=None)\n```", "chatglm3")
    assert (parsed.content, parsed.calls) == ("请稍等", (Call("f", {"x": "一", "y": [1, True], "z": None}),))
    parsed = parse_calls('\n请稍等<|assistant|>f\n{"x": 1}', "glm")
    assert (parsed.content, parsed.calls) == ("请稍等", (Call("f", {"x": 1}),))


@pytest.mark.parametrize(
    "syntax, text",
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>'),
        ("hermes", "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>"),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>'),
        ("hermes", "<tool_call>[]</tool_call>"),
        ("hermes", "<tool_call>" + "[" * 100_000),
        ("llama3", '{"name": "f", "parameters": {"x": }}'),
        ("llama3", '{"name": "f", "parameters": {}} and more'),
        ("mistral", '[TOOL_CALLS] {"name": "f", "arguments": {}}'),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}'),
        ("glm", 'f\n{"x": 1'),
        ("chatglm3", "f\n ```python\ntool_call(x=open('y'))\n```"),
        ("chatglm3", "f\n ```python\nopen(x='y')\n```"),
        ("chatglm3", "f\n ```python\ntool_call(x=1, x=2)\n```"),
        ("chatglm3", "f\n ```python\ntool_call(x=1e999)\n```"),
        ("chatglm3", "f\n ```python\ntool_call(x=" + "[" * 10_000 + ")\n```"),
    ],
)
def test_a_broken_call_is_named_and_its_text_kept(syntax: str, text: str):
    parsed = parse_calls(text, syntax)
    assert not parsed.calls and len(parsed.problems) == 1
    assert parsed.content == text


def test_a_good_call_beside_a_broken_one_counts():
    parsed = parse_calls('<tool_call>{x}</tool_call><tool_call>{"name": "f", "arguments": {}}</tool_call>', "hermes")
    assert parsed.calls == (Call("f", {}),) and len(parsed.problems) == 1
    assert parsed.content == "<tool_call>{x}</tool_call>"


def test_a_syntax_is_found_in_a_template():
    from weitiao.data.templates import PLAIN
    from weitiao.models import tiny

    assert detect(PLAIN) == "hermes"
    expected = {"qwen2": "hermes", "qwen3": "hermes", "mistral": "mistral", "llama3": "llama3", "glm": "glm"}
    assert {name: detect(tiny.FAMILIES[name].template or "") for name in expected} == expected
    assert detect(tiny.FAMILIES["gemma"].template or "") is None
    with pytest.raises(InputError, match="hermes"):
        format_call(Call("f", {}), "hermse")


PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "enum": ["经济型", "豪华型"]},
        "facilities": {
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "maxItems": 2,
            "uniqueItems": True,
        },
        "price_range_upper": {"type": "number", "minimum": 0, "exclusiveMaximum": 10000},
        "stars": {"type": ["integer", "null"], "multipleOf": 1},
        "code": {"type": "string", "pattern": "^[A-Z]{3}$"},
        "flag": {"const": True},
        "place": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["type"],
    "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}
TOOL = {"type": "function", "function": {"name": "search_hotels", "parameters": PARAMETERS}}


@pytest.mark.parametrize(
    "arguments",
    [
        {"type": "经济型"},
        {"type": "豪华型", "facilities": ["健身房", "早餐"], "price_range_upper": 300},
        {"type": "经济型", "stars": None, "code": "ABC", "flag": True, "place": {"x": 1.5}},
        {"type": "经济型", "stars": 4.0, "place": "东城区"},
    ],
)
@pytest.mark.parametrize("tool", [TOOL, TOOL["function"]])
def test_a_call_that_fits_has_no_problem(arguments: dict[str, Any], tool: dict[str, Any]):
    assert check(Call("search_hotels", arguments), [tool]) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "search_hotels: type is missing"),
        ({"type": "便宜"}, "not one of"),
        ({"type": 3}, "not one of"),
        ({"type": "经济型", "facilitys": []}, "did you mean facilities?"),
        ({"type": "经济型", "facilities": "早餐"}, "not of type array"),
        ({"type": "经济型", "facilities": ["a", 1]}, "facilities[1]: 1 is not of type string"),
        ({"type": "经济型", "facilities": ["a", ""]}, "facilities[1]: length: 0 is below 1"),
        ({"type": "经济型", "facilities": ["a", "b", "c"]}, "3 is above 2"),
        ({"type": "经济型", "facilities": ["a", "a"]}, "twice"),
        ({"type": "经济型", "price_range_upper": "300"}, '"300" is not of type number'),
        ({"type": "经济型", "price_range_upper": True}, "true is not of type number"),
        ({"type": "经济型", "price_range_upper": -1}, "below 0"),
        ({"type": "经济型", "price_range_upper": 10000}, "not below 10000"),
        ({"type": "经济型", "price_range_upper": 10**400}, "not below 10000"),
        ({"type": "经济型", "stars": 4.5}, "not of type integer | null"),
        ({"type": "经济型", "code": "abc"}, "does not match"),
        ({"type": "经济型", "flag": 1}, "is not true"),
        ({"type": "经济型", "place": {"y": 1}}, "x is missing"),
    ],
)
def test_every_kind_of_problem_is_named(arguments: dict[str, Any], words: str):
    problems = check(Call("search_hotels", arguments), [TOOL])
    assert any(words in problem for problem in problems), problems


def test_all_problems_come_at_once_and_an_unknown_tool_names_the_nearest():
    assert len(check(Call("search_hotels", {"stars": "x", "nothing": 1}), [TOOL])) == 3
    (problem,) = check(Call("serch_hotels", {}), [TOOL])
    assert "did you mean search_hotels?" in problem
    assert check(Call("f", {}), [])


def test_further_arguments_pass_only_where_the_schema_says_so():
    schema = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    assert check(Call("f", {"x": 1}), [schema])
    schema["parameters"]["additionalProperties"] = {"type": "string"}
    assert check(Call("f", {"x": "1"}), [schema]) == []
    assert check(Call("f", {"x": 1}), [schema])


def test_a_schema_that_refers_to_itself_ends():
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": []}
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"node": node}, "$defs": {"node": node}}}
    value: dict[str, Any] = {}
    for _ in range(100):
        value = {"next": value}
    assert check(Call("f", {"node": value}), [tool]) == []


class Star(Enum):
    THREE = 3
    FOUR = 4


def search(
    name: str,
    facilities: list[str] | None = None,
    kind: Literal["经济型", "豪华型"] | None = None,
    star: Star = Star.FOUR,
    upper: float | int = 0,
    place: Annotated[str, "which district"] = "",
    tags: Sequence[str] = (),
    **more: Any,
) -> list[dict[str, Any]]:
    """Find hotels
    by what a guest asks.

    More words.

    Args:
        name: part of the
            hotel's name
        facilities (list): what it must have: all of them

    Returns:
        list: records
    """
    return []


def reference(a: int, b: dict[str, int]) -> None:
    """Short.

    :param a: the first
    :param int b: the second
        goes on
    """


def test_the_schema_of_a_function():
    schema = schema_of(search)["function"]
    assert schema["name"] == "search" and schema["description"] == "Find hotels by what a guest asks."
    assert schema["parameters"] == {
        "type": "object",
        "properties": {
            "name": {"type": "string", "description": "part of the hotel's name"},
            "facilities": {
                "type": ["array", "null"],
                "items": {"type": "string"},
                "description": "what it must have: all of them",
            },
            "kind": {"type": ["string", "null"], "enum": ["经济型", "豪华型", None]},
            "star": {"type": "integer", "enum": [3, 4]},
            "upper": {"type": ["number", "integer"]},
            "place": {"type": "string", "description": "which district"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name"],
        "additionalProperties": True,
    }
    json.dumps(schema)
    assert check(Call("search", {"name": "x", "kind": None, "facilities": ["a"]}), [schema]) == []
    parameters = schema_of(reference)["function"]["parameters"]
    assert parameters["properties"]["a"] == {"type": "integer", "description": "the first"}
    assert parameters["properties"]["b"]["description"] == "the second goes on"


def test_functions_that_cannot_be_called_by_a_model_are_refused():
    def positional(*values: int) -> None:
        """No names."""

    def odd(value: bytes) -> None:
        """No JSON."""

    for function in (positional, odd):
        with pytest.raises(InputError, match="value"):
            schema_of(function)
