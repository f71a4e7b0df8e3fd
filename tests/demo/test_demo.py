"""The main job at small size: every step runs, every file is there, and the figures have their fixed names."""

import io
import json
import shlex
import signal
from contextlib import redirect_stdout

import pytest

from weitiao.cli import main
from weitiao.demo.main import MEASURES
from weitiao.generate.toolset import find_toolset
from weitiao.runs import Run
from weitiao.train.progress import Bar


def run_demo(words: list[str]) -> dict:
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main([*words, "--json"]) == 0
    return json.loads(printed.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "run"
    return output, run_demo(["demo", "--seed", "3", "--dialogues", "20", "--epochs", "0.5", "--output", str(output)])


def test_it_ends_with_one_object_of_fixed_names(ran):
    _, figures = ran
    assert figures["seed"] == 3 and figures["seconds"] > 0
    for system in ("base_zero_shot", "base_few_shot", "tuned"):
        assert set(figures[system]) == set(MEASURES)
        assert all(0 <= figures[system][name] <= (100 if name == "bleu4" else 1) for name in MEASURES)
    assert figures["rule_parser"]["slot_f1"] > 0.5


def test_the_run_folder_holds_all_that_the_report_shows(ran):
    output, figures = ran
    report = (output / "report.md").read_text(encoding="utf-8")
    for system in ("base_zero_shot", "base_few_shot", "rule_parser", "tuned"):
        assert system in report
    assert str(figures["tuned"]["call_exact_match"]) in report
    assert report.count("### test-") == 2  # all there are
    assert (output / "loss.png").stat().st_size > 1000
    rows = (output / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 16 and json.loads(rows[0])["tools"][0]["function"]["name"] == "search_hotels"
    assert [record for record in Run.open(output).metrics() if "validation" in record]


def test_a_run_of_the_demo_knows_its_tools(ran):
    from weitiao.demo.tools import toolset

    tools = find_toolset(ran[0], {"hotel": toolset})
    assert tools.functions["search_hotels"](type="豪华型")["count"] > 0
    assert tools.schemas[0]["function"]["name"] == "search_hotels"


def test_another_run_in_the_folder_is_left_alone(tmp_path, capsys):
    Run.create(tmp_path / "mine", {"output": "mine"})
    assert main(["demo", "--output", str(tmp_path / "mine")]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_a_stopped_demo_goes_on_to_the_same_figures(tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of tuning; the command that is said then is the one that is given again."""

    def words(folder):
        return ["demo", "--seed", "5", "--output", str(tmp_path / folder), "--dialogues", "20", "--epochs", "2.0"]

    def press(self, record, total_steps):
        if record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    whole = run_demo(words("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(Bar, "__call__", press)
        assert main(words("run")) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: stopped; tuning goes on from here with: weitiao demo ")
    command = shlex.split(said.split(": weitiao ")[1])
    assert command == words("run")
    stopped = Run.open(tmp_path / "run")
    assert [line["step"] for line in stopped.metrics() if "loss" in line] == [1, 2, 3] and not stopped.finished
    resumed = run_demo(command)
    assert "going on from" in capsys.readouterr().err
    for figures in (whole, resumed):
        figures.pop("seconds"), figures.pop("report")
    assert resumed == whole
    lines = [Run.open(tmp_path / name).metrics() for name in ("whole", "run")]
    losses = [[line["loss"] for line in those if "loss" in line] for those in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_finished_demo_is_replaced_by_the_next(ran):
    output, _ = ran
    again = run_demo(["demo", "--seed", "6", "--output", str(output), "--dialogues", "20", "--epochs", "0.5"])
    assert again["seed"] == 6 and Run.open(output).recipe()["train"]["seed"] == 6
    assert len([line for line in Run.open(output).metrics() if "loss" in line]) == 2
