"""config: every problem at once, each with the place it came from; values become their declared type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Discriminator, Field, Tag

from weitiao.config import Options, build, json_schema, parse, read, resolved
from weitiao.errors import InputError


class Lora(Options):
    name: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1)
    alpha: float = 16.0


class Full(Options):
    name: Literal["full"] = "full"


def method_name(value: object) -> str | None:
    return value.get("name", "lora") if isinstance(value, dict) else getattr(value, "name", None)


class Train(Options):
    epochs: int = Field(3, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    every: Literal["epoch", "none"] | int = "epoch"
    low: bool = False
    best: str | None = None


class Data(Options):
    train: str | list[str] | None = None
    validation: float | str | None = 0.1
    columns: dict[str, str] = Field(default_factory=dict)


class Recipe(Options):
    data: Data
    output: str
    train: Train = Train()
    method: Annotated[Annotated[Lora, Tag("lora")] | Annotated[Full, Tag("full")], Discriminator(method_name)] = Lora()
    stages: list[Train] = Field(default_factory=list)


def problems_of(source: str | dict, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(InputError) as caught:
        build(Recipe, read(source, overrides or []))
    return caught.value.problems


def built(**values: object) -> Recipe:
    return build(Recipe, {"data": {}, "output": "o", **values})


def test_every_problem_is_said_at_once_with_its_line(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "method: {rnak: 8, alpha: x}\ntrian:\n  epochs: 1\ntrain:\n  epochs: true\n  every: epok\n  low: 3\n"
        "data:\n  validation: [a]\nstages:\n  - epochs: 1\n  - epochs: 0\n"
    )
    assert sorted(problems_of(str(file), ["train.learning_rate=0"])) == sorted(
        [
            f'{file}:1: method.rnak: lora has no such option; did you mean "rank"? (name, rank, alpha)',
            f'{file}:1: method.alpha: expected a number, found "x"',
            f'{file}:2: trian: recipe has no such option; did you mean "train"? (data, output, train, method, stages)',
            f"{file}:5: train.epochs: expected a whole number, found true",
            f'{file}:6: train.every: "epok" is not a choice; did you mean "epoch"? (epoch, none, a whole number)',
            f"{file}:7: train.low: expected true or false, found 3",
            f'{file}:9: data.validation: expected a number or a text, found ["a"]',
            f"{file}:12: stages.1.epochs: must be at least 1, found 0",
            f"{file}: output: is required",
            "command line: train.learning_rate: must be greater than 0.0, found 0",
        ]
    )


def test_a_choice_by_name_answers_for_its_own_options():
    assert problems_of({"data": {}, "output": "o"}, ["method.name=full", "method.rank=4"]) == [
        "command line: method.rank: full has no such option (name)"
    ]
    assert problems_of({"data": {}, "output": "o"}, ["method.name=loar"]) == [
        'command line: method.name: "loar" is not a choice; did you mean "lora"? (lora, full)'
    ]


def test_a_section_that_is_a_value_is_refused():
    said = problems_of({"data": [1], "output": "o", "method": "lora", "train": None})
    assert [line.split(": ", 1) for line in said] == [
        ["data", "expected options of its own (key: value), found [1]"],
        ["train", "expected options of its own (key: value), found null"],
        ["method", 'expected options of its own (key: value), found "lora"'],
    ]


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", ".0001", "1.e-4"])
def test_a_float_is_a_number_however_it_is_written(text: str):
    assert parse(f"a: {text}", "x").values == {"a": 1e-4}
    assert build(Recipe, read({"data": {}, "output": "o"}, [f"train.learning_rate={text}"])).train.learning_rate == 1e-4
    assert built(train={"learning_rate": text}).train.learning_rate == 1e-4


@pytest.mark.parametrize("text", ["yes", "no", "on", "1:30", "007", "2024-01-01", "1_000", "0x10", "1e", "-"])
def test_what_yaml_1_1_would_turn_into_something_else_stays_text(text: str):
    assert (
        parse(f"a: '{text}'", "x").values == parse(f"a: {text}" if text != "-" else "a: '-'", "x").values == {"a": text}
    )


def test_null_numbers_and_bools_go_where_they_are_declared():
    recipe = build(
        Recipe,
        read({"data": {"validation": "0.2", "train": "a"}, "output": 2024}, ["data.validation=null", "train.low=true"]),
    )
    assert (recipe.data.validation, recipe.train.low, recipe.output) == (None, True, "2024")
    assert built(data={"validation": 1}).data.validation == 1.0
    assert built(data={"validation": "v.jsonl"}).data.validation == "v.jsonl"
    assert built(train={"every": 5}).train.every == 5
    for wrong in (2.5, True, "x", None, [1], float("nan")):
        with pytest.raises(InputError, match=r"train\.epochs"):
            built(train={"epochs": wrong})
    for wrong in (float("nan"), float("inf"), True):
        with pytest.raises(InputError, match=r"train\.learning_rate"):
            built(train={"learning_rate": wrong})


def test_overrides_reach_lists_and_lay_over_whole_sections():
    source = {"data": {"train": "a"}, "output": "o", "stages": [{"epochs": 1}, {"epochs": 2}]}
    tree = read(source, ["stages.1.epochs=7", "data.train=[b, c]", "data.columns={q: frage}"])
    recipe = build(Recipe, tree)
    assert [stage.epochs for stage in recipe.stages] == [1, 7]
    assert recipe.data.train == ["b", "c"]
    assert recipe.data.columns == {"q": "frage"}
    assert source["data"] == {"train": "a"}, "the caller's mapping is not written to"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("abc", 'command line: expected key=value, found "abc"'),
        ("=3", 'command line: expected key=value, found "=3"'),
        ("output.x=3", "command line: output.x: output is a value and has no options of its own"),
        ("stages.0.epochs.x=1", "command line: stages.0.epochs.x: epochs is a value and has no options of its own"),
        ("stages.1.x=1", "command line: stages.1.x: 1 is a value and has no options of its own"),
        ("stages.4.epochs=1", "command line: stages.4.epochs: 4 is not one of the numbers 0 to 1"),
    ],
)
def test_a_malformed_override_is_named(override: str, said: str):
    with pytest.raises(InputError) as caught:
        read({"output": "o", "stages": [{"epochs": 1}, "text"]}, [override, "nonsense"])
    assert caught.value.problems == [said, 'command line: expected key=value, found "nonsense"']


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\nb: 2\n", ":2: not valid YAML"),
        ("a: 1\na: 2\n", ":2: a: given twice"),
        ("- 1\n", "found no mapping"),
        ("a: !!python/object:os.system x\n", ":1: not valid YAML"),
        ("a: &x [*x]\n", ":1: a.0: an anchor that contains itself"),
        ("a: 1\n\tb: 2\n", ":2: not valid YAML"),
        ("a: {b: 1", ":1: not valid YAML"),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML"),
        ("a: !!int x\n", ":1: not valid YAML"),
        ("a: " + 50_000 * "[" + "\n", ":1: not valid YAML: nested too deeply"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]\n" for n in range(1, 30)),
            "more than 20000 values",
        ),
    ],
)
def test_malformed_yaml_is_named_by_line(tmp_path: Path, text: str, said: str):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read(file)
    assert f"{file}{said}" in str(caught.value) or (said in str(caught.value) and str(file) in str(caught.value))


def test_a_file_that_is_missing_a_folder_or_not_utf8(tmp_path: Path):
    (tmp_path / "latin.yaml").write_bytes("output: café".encode("latin-1"))
    for path, said in (
        (tmp_path / "no.yaml", "no such file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "latin.yaml", "not UTF-8"),
    ):
        with pytest.raises(InputError, match=said):
            read(path)


def test_the_resolved_recipe_reads_back_and_says_where_values_came_from(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text("data:\n  train: '007'\n  columns: {'a b': 'null'}\noutput: 'true'\n")
    tree = read(file, ["train.learning_rate=1e-5"])
    recipe = build(Recipe, tree)
    text = resolved(recipe, tree)
    assert build(Recipe, parse(text, "again")) == recipe
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["train"].endswith(f"# {file}:2") or "train:" in text
    assert lines["learning_rate"].endswith("# command line")
    assert lines["epochs"].endswith("# default")
    assert lines["output"].endswith(f"# {file}:4")


def test_options_are_frozen_and_have_a_schema():
    with pytest.raises(ValueError, match="frozen"):
        built().output = "other"  # pyright: ignore[reportAttributeAccessIssue]
    schema = json_schema(Recipe)
    assert set(schema["properties"]) == {"data", "output", "train", "method", "stages"}
    assert schema["additionalProperties"] is False
