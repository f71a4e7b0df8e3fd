"""Tables, whole dialogues, curves."""

from __future__ import annotations

from weitiao.data.rows import Call, Chat, Message
from weitiao.evaluate.bootstrap import Figure
from weitiao.evaluate.compare import dialogues, listing, shown, table
from weitiao.evaluate.dialogue import Turn
from weitiao.evaluate.plot import curves, smoothed


def test_figures_as_text():
    assert shown("slot_f1", Figure(0.9731, 0.96, 0.98, 12)) == "0.973 [0.960, 0.980]"
    assert shown("bleu4", {"value": 63.21, "low": 60.0, "high": 66.0, "count": 9}) == "63.2 [60.0, 66.0]"
    assert shown("task_success", Figure(0, 0, 0, 0)) == "–"
    assert shown("loss", 1.5) == "1.500" and shown("tokens", 12) == "12" and shown("x", None) == "–"


def test_tables_line_up_and_keep_every_cell():
    text = table({"基座": {"a": 0.5}, "tuned | best": {"a": 1.0, "b": Figure(0.5, 0.4, 0.6, 3)}})
    lines = text.splitlines()
    assert lines[0].split() == ["|", "system", "|", "a", "|", "b", "|"]
    assert "tuned \\| best" in lines[3] and "0.500 [0.400, 0.600]" in lines[3]
    assert lines[2].count("|") == 4 and "–" in lines[2]
    assert "| b" in listing({"b": Figure(0.5, 0.4, 0.6, 3)}) and "| 3 " in listing({"b": Figure(0.5, 0.4, 0.6, 3)})


def test_whole_dialogues():
    call = Call("search", {"type": "经济型"})
    chat = Chat(
        (
            Message("user", "找\n酒店"),
            Message("assistant", calls=(call,)),
            Message("tool", "x" * 300, name="search"),
            Message("assistant", "有一家。"),
        ),
        id="d1",
    )
    turns = [Turn("d1", 1, (call,), (call,), "", ""), Turn("d1", 3, (), (), "有一家。", "没有。")]
    text = dialogues([chat], turns)
    assert "### d1" in text and "找 酒店" in text and text.count("✓") == 1 and "✗" not in text
    assert "没有。" in text and "x" * 201 not in text and '{"type": "经济型"}' in text


def test_curves(tmp_path):
    metrics = [{"step": step, "loss": 3 / step, "epoch": 0.1} for step in range(1, 60)]
    metrics.insert(30, {"step": 30, "loss": None})
    metrics += [
        {"step": 30, "validation": {"loss": 1.0, "call_exact_match": 0.5, "slot_f1": None}},
        {"step": 59, "validation": {"loss": 0.5, "call_exact_match": 0.9}},
    ]
    for number, lines in enumerate((metrics, metrics[:20], metrics[-2:], [])):
        path = curves(lines, tmp_path / f"{number}.png")
        assert path.read_bytes().startswith(b"\x89PNG")
    assert smoothed([1.0, 3.0]) == [1.0, 3.0]
    assert smoothed([float(value) for value in range(40)])[:3] == [0.0, 0.5, 1.5]
