"""Answers beside the true ones: sacrebleu's own figures, ROUGE-L by hand, choices, a judge, one's own measure."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from sacrebleu import corpus_bleu, corpus_chrf

from tests.stub import said, serving
from weitiao.cli import main
from weitiao.errors import InputError
from weitiao.evaluate.ask import concluded
from weitiao.evaluate.choice import likelihoods, read_choices
from weitiao.evaluate.generative import measures, rouge_l
from weitiao.evaluate.judge import verdict
from weitiao.evaluate.tasks import EvaluateOptions, evaluate
from weitiao.methods.io import open_model


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("seed", range(4))
def test_bleu_and_chrf_are_sacrebleus(seed):
    draw, words = random.Random(seed), ["the", "房", "hotel", "间", "has", "有", "3.5", "stars,", "吗？", "a"]
    golds = [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(20)]
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 12))) for _ in range(19)] + [golds[-1]]
    made = measures(list(zip(golds, texts, strict=True)))
    assert made["bleu"].value == pytest.approx(corpus_bleu(texts, [golds], tokenize="zh").score)
    assert made["chrf"].value == pytest.approx(corpus_chrf(texts, [golds]).score)
    assert made["exact_match"].value == pytest.approx(np.mean([a == b for a, b in zip(golds, texts, strict=True)]))


def test_rouge_l_by_hand():
    assert rouge_l("a b c d".split(), "a c d x".split()) == pytest.approx(2 * 3 / 8)
    assert rouge_l([], []) == 1 and rouge_l(["a"], []) == 0
    assert rouge_l(list("甲乙丙"), list("丙乙甲")) == pytest.approx(1 / 3)


def test_exact_match_knows_no_case_width_or_blanks():
    made = measures([("Hotel ABC", " hotel  ＡＢＣ\n"), ("三", "叁")])
    assert made["exact_match"].value == 0.5


def test_only_the_conclusion_of_a_thought_counts():
    assert concluded("想一想……答案：不对。答案： 四") == "四" and concluded("no thought") == "no thought"


# ---- choice


def test_the_choice_that_is_likelier_is_taken(tiny_llama, tmp_path):
    rows = [{"question": f"hello {n}", "choices": ["yes", "no it is not at all"], "answer": n % 2} for n in range(6)]
    rows += [{"question": "x", "choices": {"A": "yes", "B": "no"}, "answer": "B"}]
    data, tuned = jsonl(tmp_path / "choices.jsonl", rows), open_model(tiny_llama)
    found = evaluate(tuned, EvaluateOptions(task="choice", data=data))
    losses, sizes = likelihoods(tuned, read_choices(data))
    for line, row, loss in zip(found.predictions, read_choices(data), losses, strict=True):
        assert line["predicted"] == row.choices[int(loss.argmin())] and line["gold"] == row.choices[row.answer]
    assert sizes[0].tolist() == [3, 19] and found.figures["chance"] == 0.5
    by_byte = evaluate(tuned, EvaluateOptions(task="choice", data=data, per_byte=True))
    assert next(iter(by_byte.measures)) == "accuracy_normalised"
    assert by_byte.predictions[0]["predicted"] == rows[0]["choices"][int((losses[0] / sizes[0]).argmin())]


def test_every_bad_choice_is_named(tmp_path):
    good = {"question": "q", "choices": ["a", "b"], "answer": 0}
    bad = [{"question": " "}, {"choices": ["a"]}, {"answer": 2}, {"answer": "C"}, {"answer": True}, {"choices": None}]
    data = jsonl(tmp_path / "x.jsonl", [good | one for one in bad] + [good])
    with pytest.raises(InputError) as error:
        read_choices(data)
    assert [problem.split(":")[1] for problem in error.value.problems] == list("123456")


# ---- judge


def test_a_judge_that_judges_by_place_agrees_with_itself_never(tiny_llama, tmp_path):
    data = jsonl(tmp_path / "rows.jsonl", [{"prompt": f"hello {n}", "answer": "yes"} for n in range(4)])
    options = {"task": "judge", "data": data, "max_new_tokens": 4}
    tuned = open_model(tiny_llama)
    with serving(lambda *_: said("A")) as (url, seen):
        by_place = evaluate(tuned, EvaluateOptions(**options, judge=f"{url}#judge"))
        assert len(seen) == 8
    assert by_place.figures["win_rate"]["value"] == 0.5 and by_place.figures["agreement"]["value"] == 0

    def prefers_yes(body, _):
        text = body["messages"][-1]["content"]
        return said("The better one is **A**" if "Answer A:\nyes" in text else "B")

    with serving(prefers_yes) as (url, _):
        strict = evaluate(tuned, EvaluateOptions(**options, judge=f"{url}#judge"))
    assert strict.figures["win_rate"]["value"] == 0 and strict.figures["agreement"]["value"] == 1
    with pytest.raises(InputError, match="judge"):
        evaluate(tuned, EvaluateOptions(**options))


def test_verdicts_are_letters_by_themselves():
    assert [verdict(text) for text in ("A", "选B。", "ABC", "", "<think>A</think> C", "Answer A is worse: B")] == [
        *("A", "B", None, None, "C", "B")
    ]


# ---- a measure of one's own


def test_a_measure_of_ones_own(tiny_llama, tmp_path, capsys):
    data = jsonl(tmp_path / "rows.jsonl", [{"prompt": f"hello {n}", "answer": "yes"} for n in range(3)])
    file = tmp_path / "mine.py"
    file.write_text(
        "def good(case):\n    return {'long': len(case['gold']), 'first': case['id'].endswith(':1') or None}\n"
        "def bad(case):\n    return case['nothing']\n"
        "def word(case):\n    return 'x'\n"
    )
    command = ["eval", str(tiny_llama), "--data", data, "--max-new-tokens", "2", "--json", "--task"]
    assert main([*command, f"{file}:good"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["long"]["value"] == 3 and figures["first"]["count"] == 1
    assert main([*command, f"{file}:bad"]) == 1
    assert "KeyError" in capsys.readouterr().err
    assert main([*command, f"{file}:word"]) == 2
    assert main([*command, f"{file}:none"]) == 2
    assert main([*command, f"{tmp_path}/no.py:good"]) == 2
    assert "no such file" in capsys.readouterr().err
