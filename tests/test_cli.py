"""The command line: verbs and options as documented, errors in one line, and no heavy import before it is due."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from weitiao import cli
from weitiao.errors import InputError, RunError

VERBS = {
    "env": ["--json"],
    "fetch": ["--json", "--revision", "--include", "--exclude", "--mirror", "--dataset", "--to"],
    "inspect": ["--json"],
    "convert": [],
    "tokenizer train": ["--json", "--output", "--kind", "--vocab-size", "--overwrite", "--skip-bad"],
    "tokenizer extend": ["--json", "--output", "--tokens", "--min-frequency", "--skip-bad"],
    "tokenizer compare": ["--json", "--text", "--html"],
    "data show": ["--json", "--model", "--rows", "--html", "--check", "--skip-bad", "--train-on"],
    "data stats": ["--json", "--model", "--near", "--allow-leakage", "--html", "--skip-bad"],
    "data clean": ["--json", "--output", "--rejects", "--against", "--encodings", "--near"],
    "data mix": ["--json", "--output", "--rows", "--seed", "--skip-bad"],
    "data augment": ["--json", "--by", "--variants", "--rule", "--tools", "--endpoint", "--output", "--skip-bad"],
    "data review": ["--patch", "--terminal", "--port"],
    "data split": ["--json", "--stratify", "--join", "--allow-leakage", "--skip-bad"],
    "plan": ["--json", "--fit", "--gpu", "--solve", "--models", "--all-methods", "--history", "--clients", "--context"],
    "train": ["--json", "--dry-run", "--resume", "--overwrite", "--skip-bad", "--schema"],
    "sweep": ["--json", "--methods", "--seeds", "--steps", "--tokens", "--minutes"],
    "eval compare": ["--json", "--task", "--data", "--base", "--shots", "--shot-data", "--output"],
    "eval": ["--json", "--task", "--data", "--predictions"],
    "report": ["--json"],
    "scaling": ["--json", "--widths", "--tokens", "--held-out", "--predict", "--output"],
    "merge": ["--json"],
    "chat": ["--json", "--tools", "--temperature", "--seed"],
    "bench train": ["--json", "--shape", "--method", "--data", "--steps", "--busy"],
    "bench generate": ["--json", "--shape", "--batch"],
    "bench peers": ["--json", "--peer", "--rounds"],
    "demo": ["--json", "--seed"],
}


def weitiao(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weitiao", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


def test_the_verbs_are_these():
    assert [verb.words for verb in cli.VERBS] == list(VERBS)


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.words)
def test_every_verb_exists_and_has_its_options(verb: cli.Verb, capsys: pytest.CaptureFixture[str]):
    module, _, name = verb.target.partition(":")
    assert inspect.getdoc(getattr(import_module(module), name))
    assert cli.main([*verb.words.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert not [option for option in VERBS[verb.words] if option not in shown]


def test_threads_wait_briefly_unless_a_person_says_otherwise():
    """The OpenMP library reads it when torch loads it, so a process of its own must have set it by then."""
    code = "import os, sys; from weitiao import cli; cli.main(['--version']); print(os.environ.get('GOMP_SPINCOUNT'))"
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}

    def spins(**environment: str) -> str:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env=clean | environment).stdout.split()[-1]

    assert spins() == cli.WAITING["GOMP_SPINCOUNT"]
    assert spins(GOMP_SPINCOUNT="7") == "7"
    assert spins(OMP_WAIT_POLICY="active") == "None"


def test_help_is_quick_and_imports_nothing_heavy():
    started = time.perf_counter()
    shown = weitiao("--help")
    print(f"weitiao --help: {time.perf_counter() - started:.2f} s")
    assert shown.returncode == 0 and not shown.stderr
    assert all(verb in shown.stdout for verb in VERBS)
    heavy = "torch, transformers, peft, datasets, matplotlib, rich, numpy"
    code = f"""
import sys
from weitiao.cli import main
assert main(["--help"]) == main(["data"]) == main(["--version"]) == 0
assert main(["nonsense"]) == 2
import weitiao
weitiao.InputError
print([name for name in "{heavy}".split(", ") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_mistyped_name_is_told_before_torch_is_there(verb: str, tmp_path: Path):
    words = [verb, "data.train=missing.jsonl", f"output={tmp_path / 'run'}"]
    code = f"import sys; from weitiao.cli import main; print(main({words!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["2", "False"] and "missing.jsonl" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], 'error: no such verb: trian; did you mean "train"?'),
        (
            ["data", "shwo"],
            'error: no such verb: shwo; did you mean "show"? (show, stats, clean, mix, augment, review, split)',
        ),
        (["train", "--dryrun"], "--dryrun"),
        (["train"], "error: which recipe?"),
        (["train", "no.yaml"], "error: no.yaml: no such file"),
        (["train", "--overwrite", "--resume", "x"], "error: --resume goes on with the run's own recipe"),
        (["train", "--resume", "nowhere"], "error: nowhere: holds no run"),
        (["report", "nowhere"], "error: nowhere: holds no run"),
        (["eval"], "error: "),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(words) == 2
    caught = capsys.readouterr()
    assert not caught.out
    assert said in caught.err
    assert all(line.startswith("error: ") for line in caught.err.splitlines())


def test_every_problem_of_a_recipe_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tmp_path / "x.yaml"
    recipe.write_text("method: {rnak: 4}\ntrian: {}\ndata:\n  validation: 2\n")
    assert cli.main(["train", str(recipe), "train.epochs=many", "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert f'error: {recipe}:1: method.rnak: lora has no such option; did you mean "rank"?' in lines[0] + lines[3]
    assert any(line.startswith("error: command line: train.epochs: expected a number") for line in lines)
    assert any("trian" in line and 'did you mean "train"?' in line for line in lines)
    assert any(line == f"error: {recipe}: output: is required" for line in lines)


def test_a_traceback_only_with_debug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fail(error: Exception):
        def dispatch(arguments: list[str]) -> int:
            raise error

        monkeypatch.setattr(cli, "_dispatch", dispatch)

    fail(RunError("the disk is full"))
    assert cli.main(["env"]) == 1
    assert capsys.readouterr().err == "error: the disk is full\n"
    fail(ZeroDivisionError("division by zero"))
    assert cli.main(["env"]) == 1
    assert "error: ZeroDivisionError: division by zero" in capsys.readouterr().err
    fail(InputError(f"{'hf_' + 34 * 'a'}: no such file"))
    assert cli.main(["env", "--debug"]) == 2, "the exit code is the same"
    said = capsys.readouterr().err
    assert "Traceback" in said and "in dispatch" in said and said.endswith("error: ***: no such file\n")
    assert "aaaa" not in said
    fail(KeyboardInterrupt())  # type: ignore[arg-type]
    assert cli.main(["env"]) == 1
    assert capsys.readouterr().err == "error: interrupted\n"


def test_quiet_on_a_broken_pipe():
    command = f"{sys.executable} -m weitiao train --schema | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout and not done.stderr


def test_dry_run_prints_the_resolved_recipe_and_where_values_come_from(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    recipe = tmp_path / "x.yaml"
    recipe.write_text(f"data: {{train: {tmp_path}/rows.jsonl}}\noutput: {tmp_path}/run\n")
    done = weitiao("train", recipe, "train.learning_rate=1e-4", "method.name=full", "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = {line.split(":")[0].strip(): line for line in done.stdout.splitlines()}
    assert lines["learning_rate"].split() == ["learning_rate:", "0.0001", "#", "command", "line"]
    assert lines["epochs"].endswith("# default")
    assert lines["output"].endswith(f"# {recipe}:2")
    assert not (tmp_path / "run").exists()


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"model", "method", "data", "task", "train", "output"} <= set(schema["properties"])


def test_words_are_chinese_where_the_locale_is(chinese: None, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    assert "用法" in capsys.readouterr().out
    assert cli.main(["trian"]) == 2
    assert "没有这个命令" in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.words)
def test_every_option_of_every_verb_has_its_help_in_chinese(verb: cli.Verb, chinese: None, capsys):
    parser = cli.command(verb)
    assert not [param.name for param in parser.params if param.help is None or param.help.isascii()]
    assert cli.main([*verb.words.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("用法：") and "选项：" in shown and "显示这份说明并退出" in shown
    assert not [word for word in cli.HELP_WORDS if word in shown]


MISUSED = {
    "data show": ("FILE: is missing", "FILE：缺少"),
    "data show x --rows": ("--rows: needs a value", "--rows：需要一个值"),
    "data show x --rows a": ('--rows: expected a whole number, found "a"', '--rows: 应为整数，却是 "a"'),
    "data stats x --near 2": ("--near: must be at most 1.0", "--near: 不得大于 1.0"),
    "data stats x --json=3": ("--json: takes no value", "--json：不带值"),
    "data stats x --jsno": ('did you mean "--json"?', "是不是 --json"),
    "eval x": ("--task: is missing", "--task：缺少"),
    "report a b": ("not expected here: b", "此处不应有：b"),
}


@pytest.mark.parametrize("words", MISUSED)
@pytest.mark.parametrize("number", [0, 1], ids=["en", "zh"])
def test_a_command_line_that_is_misused_is_told_in_the_persons_language(words: str, number: int, request, capsys):
    if number:
        request.getfixturevalue("chinese")
    assert cli.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert MISUSED[words][number] in line


def test_rows_or_a_model_where_a_recipe_belongs_are_told_apart(tmp_path: Path, tiny_llama: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("a.jsonl", "{}"), ("b.csv", "a,b"), ("c.json", "\n[{}]")):
        Path(name).write_text(text)
        for verb in ("train", "plan", "sweep"):
            assert cli.main([verb, name]) == 2
            said = (
                f"error: {name}: a file of rows, not a recipe; to train on it: weitiao train data.train={name} output="
            )
            assert capsys.readouterr().err.startswith(said)
    assert cli.main(["train", str(tiny_llama), "output=x"]) == 2
    assert f"to tune it: weitiao train model.path={tiny_llama} data.train=" in capsys.readouterr().err
    Path("recipe.json").write_text('{"data": {"train": "a.jsonl"}, "output": "x", "nonsense": 1}')
    assert cli.main(["train", "recipe.json"]) == 2
    assert "recipe.json:1: nonsense: " in capsys.readouterr().err


def test_a_run_that_has_not_finished_is_told_alike_by_every_verb(tmp_path: Path, capsys):
    (tmp_path / "recipe.yaml").write_text("output: x\n")
    run = str(tmp_path)
    for words in (
        ["report", run],
        ["chat", run, "--once", "你好"],
        ["merge", run, str(tmp_path / "out")],
        ["eval", run, "--task", "perplexity", "--data", "x.jsonl"],
    ):
        assert cli.main(words) == 2
        assert f"the run has not finished; go on with: weitiao train --resume {run}" in capsys.readouterr().err


def test_a_model_that_is_nowhere_is_bad_input(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "问", "answer": "答"}\n')
    for name in ("./models/none", "models/none", "none"):
        assert cli.main(["plan", f"model.path={name}", "data.train=rows.jsonl", "output=x"]) == 2
        assert f"error: {name}: no such folder" in capsys.readouterr().err


def test_what_is_piped_is_not_wrapped(capsys, monkeypatch):
    from rich.table import Table

    from weitiao.machine import terminal

    monkeypatch.setenv("COLUMNS", "40")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("名", "a long value " * 30)
    table.add_row("b", "c")
    terminal.show(table)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "名  " + ("a long value " * 30).rstrip() and second == "b   c"


def test_the_embedded_model_is_known_to_inspect_by_its_name(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", "weitiao-tiny-zh", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 1_000_000


@pytest.mark.parametrize(
    ("betas", "said"), [("[0.9]", "betas.1: is required"), ("[1,2,3]", "betas"), ("[]", "betas.0")]
)
def test_a_pair_with_too_few_or_too_many_says_where_it_was_given(betas: str, said: str, tmp_path: Path, capsys):
    recipe = tmp_path / "x.yaml"
    recipe.write_text(f"output: x\ntrain:\n  betas: {betas}\n")
    for words, origin in ((["output=x", f"train.betas={betas}"], "command line"), ([str(recipe)], f"{recipe}:3")):
        assert cli.main(["train", *words]) == 2
        assert f"error: {origin}: train.{said}" in capsys.readouterr().err


def test_python_names_resolve():
    import weitiao as package

    assert len(dir(package)) in range(15, 26)
    assert all(getattr(package, name) is not None for name in dir(package))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = package.nonsense
