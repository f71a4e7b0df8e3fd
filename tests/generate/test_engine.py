"""The decoding loop: batched = one at a time = transformers' greedy search, for every family; rows leave and end."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from weitiao.errors import InputError
from weitiao.generate import engine
from weitiao.generate.engine import generate, stream
from weitiao.generate.sample import SampleOptions
from weitiao.models import tiny

FAMILIES = [name for name in tiny.FAMILIES if "bert" not in name and name != "llama3"]


def lively(family: str, **config):
    """A tiny model whose random weights are large enough that its answers vary."""
    model = tiny.make(family, seed=1, **config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def some_prompts(model, shared: int = 20, count: int = 6) -> list[list[int]]:
    draw = random.Random(0)
    token = lambda: draw.randrange(10, model.config.vocab_size)  # noqa: E731
    prefix = [token() for _ in range(shared)]
    return [prefix + [token() for _ in range(draw.randrange(1, 25))] for _ in range(count)]


def reference(model, prompt: list[int], tokens: int) -> list[int]:
    """transformers' greedy search, one row, no end token."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def uncached(model, prompt: list[int], tokens: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def ids_of(completions) -> list[list[int]]:
    return [completion.ids for completion in completions]


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_is_unbatched_is_transformers_is_uncached(family):
    model = lively(family)
    prompts = some_prompts(model)
    options = SampleOptions(max_new_tokens=16)
    run = lambda rows, **more: ids_of(generate(model, rows, options, stop_ids=[], pad_id=0, **more))  # noqa: E731
    expected = [reference(model, prompt, 16) for prompt in prompts]
    assert run(prompts) == expected  # shared prefix computed once, padding behind it
    assert run(prompts, batch_size=4) == expected
    assert run(prompts, batch_size=1) == expected
    assert run([[5, 6, 7], *prompts])[1:] == expected  # nothing shared, padding on the left
    assert uncached(model, prompts[0], 16) == expected[0]
    assert len({tuple(row) for row in expected}) > 1


def test_why_a_model_with_a_state_is_asked_one_row_at_a_time():
    """transformers' RWKV mixes the rows that read one token each; once it does not, they can be asked together."""
    model = lively("rwkv")
    ids = torch.tensor([[5, 9, 11], [20, 21, 22]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[:, -1]
        state = model(input_ids=ids[:, :2], use_cache=True).state
        found = model(input_ids=ids[:, 2:], state=state, use_cache=True).logits[:, -1]
    assert not torch.allclose(found, wanted, atol=1e-3)


def test_a_past_that_is_carried_in_another_way_is_refused():
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(InputError, match="mamba: how it carries its past"):
        generate(MambaForCausalLM(config), [[5, 6]], stop_ids=[], pad_id=0)


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_one_length_needs_no_mask(family):
    model = lively(family)
    prompts = [prompt[:21] for prompt in some_prompts(model)]
    got = ids_of(generate(model, prompts, SampleOptions(max_new_tokens=12), stop_ids=[], pad_id=0))
    assert got == [reference(model, prompt, 12) for prompt in prompts]


def test_a_sliding_window_shorter_than_the_text():
    model = lively("mistral", sliding_window=8)
    prompts = some_prompts(model)
    got = ids_of(generate(model, prompts, SampleOptions(max_new_tokens=24), stop_ids=[], pad_id=0))
    assert got == [reference(model, prompt, 24) for prompt in prompts]
    assert got == [uncached(model, prompt, 24) for prompt in prompts]


def test_rows_that_are_done_leave_and_order_is_kept(monkeypatch):
    model = lively("qwen3")
    prompts = some_prompts(model, count=9)
    free = ids_of(generate(model, prompts, SampleOptions(max_new_tokens=40), stop_ids=[], pad_id=0))
    stop_ids = {row[index] for index, row in enumerate(free[:5])}  # rows end at different steps, some never
    sizes = []
    keep = engine.Batch.keep
    monkeypatch.setattr(engine.Batch, "keep", lambda self, slots: (sizes.append(len(slots)), keep(self, slots))[1])
    seen: dict[int, list[int]] = {row: [] for row in range(9)}
    done: list[int] = []
    got = generate(
        model,
        prompts,
        SampleOptions(max_new_tokens=40),
        stop_ids=stop_ids,
        pad_id=0,
        on_token=lambda row, token: seen[row].append(token),
        on_done=lambda row, _: done.append(row),
    )
    for row, completion in enumerate(got):
        ends = [place for place, token in enumerate(free[row]) if token in stop_ids]
        assert completion.ids == free[row][: ends[0]] if ends else free[row]
        assert completion.finish == ("stop" if ends else "length")
        assert seen[row] == completion.ids
    assert sorted(done) == list(range(9)) and sizes and max(sizes) < 9


def test_the_last_position_ends_a_row():
    model = lively("gpt2", n_positions=32)
    rows = [list(range(10, 38)), list(range(10, 42)), [10]]
    got = generate(model, rows, SampleOptions(max_new_tokens=100), stop_ids=[], pad_id=0)
    assert [len(completion.ids) for completion in got] == [5, 1, 32]
    assert {completion.finish for completion in got} == {"length"}
    assert got[0].ids == uncached(model, rows[0], 5)


def test_prompts_that_cannot_be_answered_are_all_named():
    model = lively("gpt2", n_positions=8)
    with pytest.raises(InputError) as error:
        generate(model, [[1], [], list(range(9))], stop_ids=[], pad_id=0)
    assert len(error.value.problems) == 2
    assert "9" in error.value.problems[1] and "8" in error.value.problems[1]
    with pytest.raises(InputError):
        generate(model, [[1]], SampleOptions(stop=["x"]), stop_ids=[], pad_id=0)
    assert generate(model, [], stop_ids=[], pad_id=0) == []


def test_sampling_does_not_depend_on_the_batch():
    model = lively("llama")
    prompts = some_prompts(model)
    draw = lambda seed, size: ids_of(  # noqa: E731
        generate(
            model,
            prompts,
            SampleOptions(temperature=1.5, top_k=50, top_p=0.95, seed=seed, max_new_tokens=16),
            stop_ids=[],
            pad_id=0,
            batch_size=size,
        )
    )
    assert draw(3, 6) == draw(3, 1) == draw(3, 4)
    assert draw(3, 6) != draw(4, 6)
    same = generate(model, [prompts[0]] * 4, SampleOptions(temperature=2, max_new_tokens=16), stop_ids=[], pad_id=0)
    assert len({tuple(completion.ids) for completion in same}) == 4


def test_repetition_penalty_is_transformers():
    model = lively("llama")
    prompts = some_prompts(model, count=3)
    options = SampleOptions(repetition_penalty=1.3, max_new_tokens=16)
    got = ids_of(generate(model, prompts, options, stop_ids=[], pad_id=0))
    model.generation_config.eos_token_id = None
    for prompt, ids in zip(prompts, got, strict=True):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, repetition_penalty=1.3, pad_token_id=0
        )
        assert out[0, len(prompt) :].tolist() == ids


def test_a_training_model_generates_without_dropout_and_goes_on_training():
    model = lively("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = ids_of(generate(model, [[5, 6, 7]], SampleOptions(max_new_tokens=8), stop_ids=[], pad_id=0))
    model.train()
    assert ids_of(generate(model, [[5, 6, 7]], SampleOptions(max_new_tokens=8), stop_ids=[], pad_id=0)) == expected
    assert model.training


def test_an_attached_lora_generates_as_transformers_does():
    from weitiao.methods import METHODS

    model = METHODS["lora"].model_validate({"rank": 2}).attach(lively("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    prompts = some_prompts(model, count=3)
    got = ids_of(generate(model, prompts, SampleOptions(max_new_tokens=8), stop_ids=[], pad_id=0))
    model.eval()
    assert got == [uncached(model, prompt, 8) for prompt in prompts]


def test_float32_trainables_in_a_bfloat16_model():
    model = lively("llama").bfloat16()
    model.config.dtype = torch.bfloat16
    model.model.layers[-1].float()
    assert len(generate(model, [[5, 6, 7], [8, 9]], SampleOptions(max_new_tokens=4), stop_ids=[], pad_id=0)[0].ids) == 4


# --- streaming


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_streaming_never_splits_a_character(family, tmp_path):
    """Random weights write random bytes: the hardest text there is."""
    model, tokenizer = lively(family), tiny.make_tokenizer(family)
    for seed in range(3):
        options = SampleOptions(temperature=3.0, seed=seed, max_new_tokens=60)
        prompt = tokenizer.encode("你好")
        pieces = list(stream(model, tokenizer, prompt, options))
        whole = generate(model, [prompt], options, stop_ids=[], pad_id=0, tokenizer=tokenizer)[0]
        assert "".join(pieces) == whole.text


def test_stop_texts_end_an_answer_and_are_never_shown():
    model, tokenizer = lively("llama"), tiny.make_tokenizer("llama")
    prompt = tokenizer.encode("hello")
    free = generate(model, [prompt], SampleOptions(max_new_tokens=40), stop_ids=[], pad_id=0, tokenizer=tokenizer)[0]
    stop = free.text[9:14]
    cut = free.text[: free.text.index(stop)]
    options = SampleOptions(max_new_tokens=40, stop=[stop, "never said"])
    got = generate(model, [prompt], options, stop_ids=[], pad_id=0, tokenizer=tokenizer)[0]
    assert (got.text, got.finish) == (cut, "stop")
    assert len(got.ids) < 40
    assert "".join(stream(model, tokenizer, prompt, options)) == cut
