"""Rendering, by properties: the template's own tokens, trained where the assistant speaks, served as trained."""

from __future__ import annotations

import json
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weitiao.data.render import FALLBACK, Rendered, Renderer, encode_text, examples
from weitiao.data.rows import Call, Chat, Labelled, Message, Text
from weitiao.data.templates import PLAIN
from weitiao.errors import InputError
from weitiao.models import tiny

FAMILIES = sorted(tiny.FAMILIES)
TOOL = {
    "type": "function",
    "function": {
        "name": "search_hotels",
        "description": "查找酒店 / find hotels",
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "price_range_upper": {"type": "number"}},
            "required": [],
        },
    },
}
CALL = Call("search_hotels", {"name": "北京饭店", "price_range_upper": 300})
SECOND = Call("search_hotels", {"name": "é<|x|>\n\"'"})


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str = "", *calls: Call) -> Message:
    return Message("assistant", text, calls)


ONE = Chat((user("你好"), assistant("您好！😀 wörld")), id="one")
SEVERAL = Chat(
    (user("hi"), assistant("hello\nthere"), user("300元  左右"), assistant("好的。"), user("再见"), assistant("bye"))
)
SYSTEM = Chat((Message("system", "你是助手。"), *SEVERAL.messages), id="system")
ENDS_WITH_USER = Chat(SEVERAL.messages[:-1], id="ends with user")
TOOLS = Chat(
    (
        Message("system", "帮客人找酒店。"),
        user("找北京饭店，300元以下"),
        assistant("", CALL),
        Message("tool", '[{"name": "北京饭店", "price": 280}]', name="search_hotels"),
        assistant("北京饭店，280元。"),
        user("换一家"),
        assistant("", SECOND),
        Message("tool", "[]", name="search_hotels"),
        assistant("没有找到。"),
    ),
    (TOOL,),
    "tools",
)
PLAIN_CHATS = (ONE, SEVERAL, SYSTEM, ENDS_WITH_USER)


@cache
def tokenizer_of(family: str) -> Any:
    tokenizer = tiny.make_tokenizer(family)
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    return tokenizer


@cache
def renderer_of(family: str, tools: bool = False) -> Renderer:
    return Renderer.of(tokenizer_of(family), tools=tools)


def openai(chat: Chat) -> list[dict[str, Any]]:
    """The conversation as a program that knows only transformers would pass it."""
    found: list[dict[str, Any]] = []
    for message in chat.messages:
        found.append({"role": message.role, "content": message.content})
        if message.calls:
            found[-1]["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in message.calls
            ]
        if message.name:
            found[-1]["name"] = message.name
    return found


def expected(renderer: Renderer, chat: Chat) -> list[int]:
    """What the chat template alone makes of it."""
    conversation = openai(chat)
    if renderer.folds_system and conversation[0]["role"] == "system":
        conversation[1]["content"] = conversation[0]["content"] + "\n\n" + conversation[1]["content"]
        del conversation[0]
    tokenizer, tools = renderer.tokenizer, [*chat.tools] or None
    text = tokenizer.apply_chat_template(conversation, tools=tools, chat_template=renderer.template, tokenize=False)  # type: ignore[arg-type]
    assert isinstance(text, str)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def runs(rendered: Rendered) -> list[tuple[int, int]]:
    """(start, end) of every run of trained tokens."""
    found, place = [], 0
    for trained, group in groupby(rendered.mask):
        size = len(list(group))
        if trained:
            found.append((place, place + size))
        place += size
    return found


def check_served_as_trained(renderer: Renderer, chat: Chat) -> list[list[int]]:
    """Every trained run begins where a served prompt ends, and no token before it differs. Returns the runs."""
    places = [place for place, message in enumerate(chat.messages) if message.role == "assistant"]
    prompts = iter([renderer.prompt(chat.messages[:place], chat.tools) for place in places])
    answers = []
    (made,) = renderer.renders([chat])
    assert isinstance(made, list)
    for rendered in made:
        assert len(rendered.ids) == len(rendered.mask)
        for start, end in runs(rendered):
            assert rendered.ids[:start] == next(prompts)
            answers.append(rendered.ids[start:end])
    assert next(prompts, None) is None
    return answers


# --- the matrix: families x conversations


@pytest.mark.parametrize("chat", PLAIN_CHATS, ids=lambda chat: chat.id)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_templates_own(family: str, chat: Chat):
    renderer = renderer_of(family)
    rendered = renderer.render(chat)
    assert rendered.ids == expected(renderer, chat)
    assert len(rendered.mask) == len(rendered.ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_templates_own_with_tools(family: str):
    renderer = renderer_of(family, tools=True)
    assert renderer.render(TOOLS).ids == expected(renderer, TOOLS)


@pytest.mark.parametrize("chat", [*PLAIN_CHATS, TOOLS], ids=lambda chat: chat.id)
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_is_what_the_assistant_says_and_no_more(family: str, chat: Chat):
    renderer = renderer_of(family, bool(chat.tools))
    answers = check_served_as_trained(renderer, chat)
    said = [message for message in chat.messages if message.role == "assistant"]
    assert len(answers) == len(said)
    for answer, message in zip(answers, said, strict=True):
        assert answer[-1] in renderer.stop_ids
        assert not any(token in renderer.stop_ids for token in answer[:-1])
        lowered = renderer.tokenizer.backend_tokenizer.normalizer is not None and family == "bert"
        found = renderer.parse(renderer.decode(answer))
        if not lowered:
            assert found == Message("assistant", message.content, message.calls)
        assert found == renderer.parse(renderer.marker.decode(answer))  # with its end-of-turn token


@pytest.mark.parametrize("chat", [SYSTEM, TOOLS], ids=lambda chat: chat.id)
@pytest.mark.parametrize("family", FAMILIES)
def test_whom_to_train(family: str, chat: Chat):
    renderer = renderer_of(family, bool(chat.tools))
    (every,), (last,), (whole,) = (renderer.renders([chat], on) for on in ("assistant", "last", "all"))
    assert isinstance(every, list) and isinstance(last, list) and isinstance(whole, list)
    assert len(last) == len(whole) == 1
    assert all(whole[0].mask) and whole[0].ids == last[0].ids
    start, end = runs(every[-1])[-1]
    assert runs(last[0]) == [(start, end)] and last[0].ids[:end] == every[-1].ids[:end]


@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen2", "gemma", "llama", "glm", "phi3"])
def test_a_turns_prompt_begins_the_next_turns(family: str):
    renderer = renderer_of(family)
    prompts = [renderer.prompt(SEVERAL.messages[:place]) for place in (1, 3, 5)]
    for earlier, later in pairwise(prompts):
        assert later[: len(earlier)] == earlier


def test_templates_that_rewrite_earlier_turns_give_one_example_a_turn():
    (made,) = renderer_of("qwen3").renders([SEVERAL])
    assert isinstance(made, list) and len(made) == 3
    assert [len(runs(rendered)) for rendered in made] == [1, 1, 1]
    (made,) = renderer_of("qwen2").renders([SEVERAL])
    assert isinstance(made, list) and [len(runs(rendered)) for rendered in made] == [3]


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "mistral"])
def test_several_calls_and_words_in_one_turn(family: str):
    renderer = renderer_of(family, tools=True)
    words = "" if family == "mistral" else "我查一下。"  # this template writes no words beside calls
    message = assistant(words, CALL, SECOND)
    chat = Chat((user("找两家"), message), (TOOL,))
    (answer,) = check_served_as_trained(renderer, chat)
    assert renderer.parse(renderer.decode(answer)) == message


# --- any text


CONTENT = st.text(
    st.sampled_from("ab 你好。\n\t\u3000é😀🏨'\"{}<|>/#:0[]") | st.characters(codec="utf-8"), min_size=1, max_size=20
).filter(lambda text: text.strip() != "")


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama3", "qwen2", "qwen3", "mistral", "gemma", "glm", "phi3"])
@settings(max_examples=25)
@given(contents=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3), system=st.none() | CONTENT)
def test_any_text_is_trained_and_served_alike(family: str, contents: list[tuple[str, str]], system: str | None):
    renderer = renderer_of(family)
    messages = [message for question, answer in contents for message in (user(question), assistant(answer))]
    chat = Chat((*([Message("system", system)] if system else []), *messages))
    assert renderer.render(chat).ids == expected(renderer, chat)
    answers = check_served_as_trained(renderer, chat)
    for ids, (_, answer) in zip(answers, contents, strict=True):
        decoded = renderer.marker.decode(ids[:-1]).strip().removeprefix("<think>\n\n</think>").strip()
        normal = renderer.tokenizer.backend_tokenizer.normalizer
        assert decoded == (normal.normalize_str(answer) if normal else answer).strip()


MARKUP = ("<|im_start|>assistant\n", "<|im_end|>", "<|eot_id|>", "</s>", "### assistant\n", "<|assistant|>")


@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen2", "glm", "mistral"])
@pytest.mark.parametrize("markup", MARKUP)
def test_markup_in_a_question_or_a_result_is_never_trained(family: str, markup: str):
    renderer = renderer_of(family)
    chat = Chat((user(f"a{markup}b"), assistant("yes"), user(markup), assistant("no")))
    decoded = [renderer.parse(renderer.decode(answer)).content for answer in check_served_as_trained(renderer, chat)]
    assert decoded == ["yes", "no"]


def family_of_tokenizers() -> dict[str, Any]:
    """Tokenizers of other builds, with merges and spaces where templates cut."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    text = [*tiny.SENTENCES, "\n\n\n\n### user\n\nhi ### assistant\n\n: : yes\n\n" * 20, "\n: yes\n: yes\n: yes" * 50]
    special = ["<unk>", "<s>", "</s>"]

    def made(model: Any, trainer: Any, pre: Any, decoder: Any, normalizer: Any = None, post: Any = None) -> Any:
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoder
        if normalizer:
            tokenizer.normalizer = normalizer
        tokenizer.train_from_iterator(text, trainer)
        if post:
            tokenizer.post_processor = post
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")

    bpe = {"vocab_size": 500, "special_tokens": special, "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    replace = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return {
        "bytes without words": made(
            models.BPE(),
            trainers.BpeTrainer(**bpe, initial_alphabet=alphabet),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            decoders.ByteLevel(),
        ),
        "bytes, trimmed offsets": made(
            models.BPE(),
            trainers.BpeTrainer(**bpe, initial_alphabet=alphabet),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
            post=processors.ByteLevel(trim_offsets=True),
        ),
        "pieces with a prefix": made(
            models.BPE(unk_token="<unk>"), trainers.BpeTrainer(**bpe), None, pieces, normalizer=replace
        ),
        "unigram": made(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False),
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            decoders.Metaspace(prepend_scheme="first"),
        ),
        "words": made(
            models.WordLevel(unk_token="<unk>"),
            trainers.WordLevelTrainer(vocab_size=300, special_tokens=special, show_progress=False),
            pre_tokenizers.BertPreTokenizer(),
            decoders.WordPiece(),
        ),
    }


LOOSE = """{% for m in messages %}{% if m.role == 'assistant' %}: {{ m.content }}{{ eos_token }}
{% else %}{{ m.role }}
{{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}: {% endif %}"""


@pytest.mark.parametrize("template", [PLAIN, LOOSE], ids=["plain", "loose"])
@pytest.mark.parametrize("content", ["yes", "\n\nyes", " yes", ": : yes", "你好😀", "<unk> 字"])
def test_other_tokenizers_and_merges_across_the_boundary(template: str, content: str, tmp_path: Path):
    chat = Chat((user("hi"), assistant(content), user("and?"), assistant(content)))
    for name, tokenizer in built().items():
        renderer = Renderer(tokenizer, template)
        assert renderer.render(chat).ids == expected(renderer, chat), name
        answers = check_served_as_trained(renderer, chat)
        assert all(answer[-1] == tokenizer.eos_token_id for answer in answers), name
        if name.startswith("bytes"):
            assert [renderer.decode(answer).strip() for answer in answers] == [content.strip()] * 2


@cache
def built() -> dict[str, Any]:
    return family_of_tokenizers()


def test_a_merge_across_the_boundary_really_occurs_in_these_tests():
    renderer = Renderer(built()["bytes without words"], LOOSE)
    (made,) = renderer.renders([Chat((user("hi"), assistant("yes"), user("and?"), assistant("yes")))])
    assert isinstance(made, list) and len(made) == 2


# --- which template


def test_the_models_own_template_comes_first_and_the_fallback_is_named():
    assert renderer_of("qwen2", tools=True).template_name == "own" and not renderer_of("qwen2", tools=True).said
    for family, tools in (("gpt2", False), ("bert", False), ("llama", True), ("gemma", True)):
        renderer = renderer_of(family, tools)
        assert renderer.template_name == FALLBACK and renderer.template == PLAIN
        assert len(renderer.said) == 1 and FALLBACK in renderer.said[0]
        assert renderer.can_call and renderer.syntax == "hermes"
    assert renderer_of("llama").template_name == renderer_of("gemma").template_name == "own"


def test_a_template_is_named_or_read_from_a_file(tmp_path: Path):
    tokenizer = tokenizer_of("qwen2")
    assert Renderer.of(tokenizer, override=FALLBACK).template == PLAIN
    (tmp_path / "mine.jinja").write_text(LOOSE)
    renderer = Renderer.of(tokenizer, override=str(tmp_path / "mine.jinja"))
    assert renderer.template == LOOSE and renderer.template_name.endswith("mine.jinja")
    with pytest.raises(InputError, match="cannot be used with tools"):
        Renderer.of(tokenizer, tools=True, override=str(tmp_path / "mine.jinja"))
    with pytest.raises(InputError, match="weitiao-plain"):
        Renderer.of(tokenizer, override="weitiao-plane")
    (tmp_path / "broken.jinja").write_text("{% for m in %}")
    with pytest.raises(InputError):
        Renderer.of(tokenizer, override=str(tmp_path / "broken.jinja"))


def test_the_template_is_saved_and_another_one_is_noticed(tmp_path: Path):
    from transformers import AutoTokenizer

    renderer = renderer_of("gpt2")
    renderer.tokenizer.save_pretrained(tmp_path)
    renderer.save(tmp_path)
    again = Renderer.of(AutoTokenizer.from_pretrained(tmp_path), tools=True)
    assert (again.template, again.template_name, again.said) == (PLAIN, FALLBACK, [])
    assert json.loads((tmp_path / "weitiao_template.json").read_text())["name"] == FALLBACK
    (tmp_path / "chat_template.jinja").write_text(PLAIN.replace("###", "##"))
    with pytest.raises(InputError, match="not the template"):
        Renderer.of(AutoTokenizer.from_pretrained(tmp_path))
    Renderer.of(AutoTokenizer.from_pretrained(tmp_path), override=FALLBACK)


def test_a_generation_prompt_that_the_answer_does_not_begin_with_is_refused():
    thinking = LOOSE.replace(
        "{% if add_generation_prompt %}: {% endif %}", "{% if add_generation_prompt %}: hm{% endif %}"
    )
    with pytest.raises(InputError, match="generation prompt"):
        Renderer(tokenizer_of("gpt2"), thinking)


CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}BEFORE{{ m.content }}AFTER{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
PROMPT{% endif %}"""


def chatml(before: str, after: str, prompt: str) -> Any:
    tokenizer = tiny.make_tokenizer("qwen2")
    template = CHATML.replace("BEFORE", before).replace("AFTER", after).replace("PROMPT", prompt)
    tokenizer.chat_template = template
    return tokenizer


def test_thoughts_are_switched_off_where_the_prompt_opens_one_and_answers_have_none(tmp_path: Path):
    switch = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>\n{% endif %}"
    renderer = Renderer.of(chatml("<think></think>", "", switch))
    assert "enable_thinking off" in renderer.template_name and "enable_thinking" in renderer.said[0]
    assert renderer.text([user("a")], generate=True).endswith("<think></think>")
    check_served_as_trained(renderer, SEVERAL)
    with pytest.raises(InputError, match="generation prompt"):
        Renderer.of(chatml("", "", "<think>\n"))


@pytest.mark.parametrize(
    "before, after, prompt",
    [
        ("<|channel|>final<|message|>", "", ""),
        ("", "<|end_of_answer|>", ""),
        ("<think>\n\n</think>\n\n", "", ""),
        ("<think>\n\n</think>\n\n", "", "<think>\n"),
    ],
)
def test_what_a_template_writes_around_an_answer_is_no_part_of_it(before: str, after: str, prompt: str):
    renderer = Renderer.of(chatml(before, after, prompt))
    answers = check_served_as_trained(renderer, SEVERAL)
    assert [renderer.parse(renderer.decode(answer)).content for answer in answers] == ["hello\nthere", "好的。", "bye"]
    assert renderer.parse("bare").content == "bare"


def test_a_template_that_drops_words_is_refused():
    parts = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    with pytest.raises(InputError, match="leaves out the words"):
        Renderer(tokenizer_of("qwen2"), parts)


def test_ids_are_given_to_calls_where_the_template_insists_on_them():
    strict = tiny.FAMILIES["mistral"].template or ""
    strict = strict.replace("(', \"id\": \"' + call.id + '\"' if call.id else '')", "', \"id\": \"' + call.id + '\"'")
    assert strict != tiny.FAMILIES["mistral"].template
    renderer = Renderer(tokenizer_of("mistral"), strict)
    assert renderer.can_call
    text = renderer.text(TOOLS.messages, TOOLS.tools)
    assert '"id": "call00000"' in text and '"id": "call00001"' in text
    check_served_as_trained(renderer, TOOLS)


def test_glm_writes_calls_by_name_and_line():
    renderer = renderer_of("glm", tools=True)
    assert (renderer.template_name, renderer.syntax, renderer.ends_turns) == ("own", "glm", False)
    ends = {renderer.marker.decode([token]) for token in renderer.stop_ids}
    assert ends == {"<|endoftext|>", "<|user|>", "<|observation|>"}
    answers = check_served_as_trained(renderer, TOOLS)
    parsed = [renderer.parse(renderer.decode(answer)) for answer in answers]
    assert [message.calls for message in parsed] == [(CALL,), (), (SECOND,), ()]


def test_a_last_turn_that_the_template_leaves_open_gets_an_eos():
    renderer = renderer_of("glm")
    (made,) = renderer.renders([Chat((user("a"), assistant("b \n")))])
    assert isinstance(made, list)
    assert made[0].ids[-1] == renderer.tokenizer.eos_token_id and made[0].mask[-1]


def test_a_refused_conversation_says_what_the_template_says():
    (error,) = renderer_of("llama").renders([Chat((user("a"), user("b"), assistant("c")))])
    assert isinstance(error, InputError) and "must alternate" in str(error)
    with pytest.raises(InputError, match="cannot be used with tools"):
        renderer_of("llama").prompt([user("a")], [TOOL])


def test_thoughts_stay_words_and_are_not_searched_for_calls():
    renderer = renderer_of("qwen3", tools=True)
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    parsed = renderer.parsed(f"<think>\nmaybe {call}?\n</think>\n\nok {call}<|im_end|>")
    assert parsed.calls == (Call("f", {}),) and parsed.content.endswith("</think>\n\nok")
    assert renderer.parse("<think>\n\n</think>\n\nok").content == "ok"


# --- examples


def options(**values: Any) -> Any:
    return SimpleNamespace(
        **({"max_length": "auto", "train_on": "assistant", "allow_truncated": 0.01, "skip_bad": False} | values)
    )


def test_examples_count_what_they_hold():
    made = examples([ONE, SEVERAL, SYSTEM], renderer_of("qwen2"), options())
    assert len(made) == made.rows == 3 and made.truncated == made.masked_out == 0 and not made.said
    assert made.tokens == sum(made.lengths) and made.trained_tokens == sum(e.mask.sum() for e in made)
    assert made[0].id == "one" and made[0].ids.dtype == "int32" and made[0].mask.dtype == bool
    assert len(made[:2]) == 2


def test_what_changes_a_conversation_is_said():
    assert "one example per assistant turn" in examples([SEVERAL], renderer_of("qwen3"), options()).said[0]
    assert "system" in examples([SYSTEM], renderer_of("gemma"), options()).said[0]
    mixed = Chat((user("a"), assistant("words", CALL)), (TOOL,))
    assert "leaves out" in examples([mixed], renderer_of("llama3", True), options()).said[0]
    assert not examples([mixed], renderer_of("qwen2", True), options()).said


def test_answers_that_max_length_cuts_are_counted_and_refused_past_the_allowed_share():
    renderer = renderer_of("qwen2")
    long = Chat((user("a"), assistant("b" * 200)), id="long one")
    rows = [ONE] * 9 + [long]
    with pytest.raises(InputError, match="1 of 10 examples") as caught:
        examples(rows, renderer, options(max_length=100))
    assert any("long one" in problem for problem in caught.value.problems)
    made = examples(rows, renderer, options(max_length=100, allow_truncated=0.1))
    assert made.truncated == 1 and max(made.lengths) == 100 and made[-1].mask[-1]
    assert any("1 example" in line for line in made.said)
    for values, reason, mend in (
        ({"max_length": 100}, "data.max_length", "raise data.max_length"),
        ({}, "positions", "base"),
    ):
        with pytest.raises(InputError) as caught:
            examples(rows, renderer, options(**values), max_positions=100)
        (problem, *_) = caught.value.problems
        assert reason in problem and mend in problem and ("raise data.max_length" in problem) == bool(values)


def test_cutting_what_is_not_trained_counts_for_nothing():
    chat = Chat((user("a"), assistant("b"), user("c" * 200)))
    assert examples([chat], renderer_of("qwen2"), options(max_length=60)).truncated == 0


def test_rows_in_which_nothing_is_trained_stop_the_run_or_are_left_out():
    renderer = renderer_of("qwen2")
    silent, buried = Chat((user("a"),), id="silent"), Chat((user("a" * 200), assistant("b")), id="buried")
    with pytest.raises(InputError) as caught:
        examples([ONE, silent, buried], renderer, options(max_length=100))
    said = "\n".join(caught.value.problems)
    assert "silent" in said and "prompt alone" in said and "2 of 3 rows are bad; --skip-bad" in said
    assert said.count("buried") == 1, "what is bad is not also truncated"
    made = examples([ONE, silent, buried], renderer, options(max_length=100, skip_bad=True, allow_truncated=1.0))
    assert len(made) == 1 and made.masked_out == 2 and "2 rows left out" in made.said[-3]
    assert "silent" in made.said[-2] and "buried" in made.said[-1]
    with pytest.raises(InputError, match="nothing to train on"):
        examples([silent], renderer, options(skip_bad=True))


def test_all_refused_rows_are_named_at_once_and_the_rest_counted():
    bad = [Chat((user("a"), user("b"), assistant("c")), id=f"file:{line}") for line in range(30)]
    with pytest.raises(InputError) as caught:
        examples([ONE, *bad, Labelled("a", "b", id="labelled")], renderer_of("llama"), options())
    *named, rest, last = caught.value.problems
    assert len(named) == 20 and "file:0" in named[0] and "11" in rest and "31 of 32 rows are bad" in last


def test_the_longest_example_is_bounded_by_the_model():
    renderer = renderer_of("qwen2")
    with pytest.raises(InputError, match="2048 is more than the 1024"):
        examples([ONE], renderer, options(max_length=2048), max_positions=1024)
    long = Chat((user("a"), assistant("b" * 3000)))
    made = examples([long], renderer, options(allow_truncated=1.0), max_positions=512)
    assert made.lengths == [512]
    assert examples([long], renderer, options(allow_truncated=1.0)).lengths == [1024]  # the tokenizer's own limit


def test_pretraining_trains_everything_and_loses_nothing():
    renderer = renderer_of("llama3")
    text = Text("天气很好。" * 100, id="text")
    made = examples([text, ONE], renderer, options(max_length=64), "pretrain")
    assert max(made.lengths) <= 64 and made.truncated == 0
    assert all(example.mask.all() for example in made)
    parts = [example for example in made if example.id.startswith("text")]
    assert [token for part in parts for token in part.ids.tolist()] == encode_text(renderer.tokenizer, text.text).ids
    with pytest.raises(InputError, match="Text"):
        examples([text], renderer, options())


def test_plain_text_gets_the_tokenizers_own_bos_and_an_eos():
    assert tokenizer_of("llama").decode(encode_text(tokenizer_of("llama"), "hi").ids) == "<s>hi</s>"
    assert tokenizer_of("qwen2").decode(encode_text(tokenizer_of("qwen2"), "hi").ids) == "hi<|im_end|>"
    assert all(encode_text(tokenizer_of("gpt2"), "").mask)


def test_progress_is_told():
    told: list[tuple[int, int]] = []
    examples([ONE] * 300, renderer_of("qwen2"), options(), progress=lambda done, total: told.append((done, total)))
    assert told == [(256, 300), (300, 300)]
