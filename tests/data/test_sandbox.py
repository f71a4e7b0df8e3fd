"""Chat templates from outside: the bytes that transformers writes, and no template that runs on or gets out."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from weitiao.data import sandbox
from weitiao.data.templates import PLAIN
from weitiao.errors import InputError
from weitiao.models import tiny

FOLDER = Path(sandbox.__file__).parent.parent / "models" / "templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))} | {"plain": PLAIN}
VALUES: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "tools": None, "add_generation_prompt": True}
TOOL = {"type": "function", "function": {"name": "search", "description": "d", "parameters": {"type": "object"}}}
NEST = "{% set ns = namespace(a=(1, 2)) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}"
GROW = "{% set ns = namespace(a='aaaa') %}{% for i in range(60) %}{% set ns.a = "
BAD = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a filtered loop": "{% set x = range(99999) %}{% for i in x %}{% for j in x if false %}{% endfor %}{% endfor %}",
    "a loop in a call": "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endcall %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "macros without end": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "sorting": "{% set x = range(99999)|list %}{% for i in x %}{% set y = x|sort(reverse=true) %}{% endfor %}",
    "times": "{{ 'a' * 10**9 }}", "a list times": "{{ [0] * 10**9 }}", "a power": "{{ 2 ** (2 ** 30) }}",
    "doubling": GROW + "ns.a + ns.a %}{% endfor %}{{ ns.a }}", "joining": GROW + "ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    "nested, to JSON": NEST + "{{ ns.a|tojson }}", "nested, printed": NEST + "{{ ns.a }}",
    "nested, hashed": NEST + "{{ {ns.a: 1} }}", "nested, compared": NEST + "{{ ns.a == [ns.a] }}",
    "a namespace in itself": "{% set n = namespace() %}{% set n.a = n %}{{ n }}",
    "constant": "{{ 'a'|center(1000000000) }}", "a width": "{{ '%1000000000d' % 1 }}",
    "a format": "{{ '{:1000000000d}'.format(1) }}", "a width from elsewhere": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "a star": "{{ '%*d' % (10**9, 1) }}", "the filter format": "{{ '%1000000000d'|format(1) }}",
    "replace": "{% set a = 'a' * 99999 %}{{ a.replace('a', a) }}", 
    "the filter replace": "{{ ('a'*99999)|replace('a', 'b'*99999) }}",
    "join": "{% set a = 'a' * 99999 %}{{ a.join(a|list) }}", "ljust": "{{ 'a'.ljust(10**9) }}",
    "indent": "{{ ('a\n' * 99999)|indent(9999) }}", "JSON with wide lines": "{{ [[1]]|tojson(indent=10**9) }}",
    "output": "{% set a = 'x' * 99999 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
    "a block": "{% set a = 'x' * 99999 %}{% set b %}{% for i in range(99999) %}{{ a }}{% endfor %}{% endset %}",
    "many": "".join(f"{{% set v{n} = 'a' * 999999 %}}" for n in range(500)),
    "map": "{{ range(99999)|map('string')|map('center', 9999)|list|length }}", 
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "a long template": "x" * 70_000, "no end": "{% if 1 %}",
    "Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}", 
    "format to Python": "{{ '{0.__class__.__mro__}'.format('') }}",
    "a file": "{% include '/etc/passwd' %}", "a module": "{% import 'os' as os %}{{ os }}",
    "globals": "{{ namespace.__init__.__globals__ }}", "its own words": "{{ raise_exception('no system turn') }}",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_template_is_stopped(name: str):
    start = time.process_time()
    with pytest.raises(InputError, match="chat template"):
        sandbox.render(BAD[name], VALUES)
    assert time.process_time() - start < 2


def conversation(draw: random.Random) -> list[dict[str, Any]]:
    """Turns of any length, with a system turn, calls and thoughts, or without."""
    turns: list[dict[str, Any]] = [{"role": "system", "content": "系统"}] if draw.random() < 0.5 else []
    for _ in range(draw.choice((1, 2, 9))):
        turns.append({"role": "user", "content": "问 " * draw.randrange(1, 300)})
        if draw.random() < 0.3:
            call = {"name": "search", "arguments": {"a": "v\n", "b": [1, 2.5, None]}}
            turns.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]})
            turns.append({"role": "tool", "content": '{"n": 1}', "name": "search"})
        turns.append({"role": "assistant", "content": draw.choice(("答", "<think>\n想\n</think>\n\n答 {{ 1 }}"))})
    return turns


@pytest.mark.parametrize("name", TEMPLATES)
def test_models_templates_write_the_same_bytes_as_transformers(name: str):
    tokenizer, draw, same = tiny.make_tokenizer("llama"), random.Random(name), 0
    for _ in range(30):
        turns, tools, generate = conversation(draw), draw.choice((None, [TOOL])), draw.random() < 0.5
        values = {"messages": turns, "tools": tools, "documents": None, "add_generation_prompt": generate}
        try:
            wanted: Any = tokenizer.apply_chat_template(
                turns, tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=generate, tokenize=False
            )
        except Exception:
            with pytest.raises(InputError):
                sandbox.render(TEMPLATES[name], values | tokenizer.special_tokens_map)
            continue
        assert sandbox.render(TEMPLATES[name], values | tokenizer.special_tokens_map) == wanted
        same += 1
    assert same


@pytest.mark.parametrize(
    "template",
    [
        "{%- generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% else %}none{% endfor %}",
        "{{ '%s|%05d' % ('a', 7) }}{{ '{:>4}'.format('b') }}{{ messages|tojson(indent=2) }}",
        "{% set x %}{{ 1 }}{% endset %}{{ x ~ [1, 'a'] }}{{ 'ab' * 3 }}{{ (1, 2) + (3,) }}",
        "{% set a, b = 1, 2 %}{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{{ a }}{{ b }}{% endfor %}",
        "{{ [3, 1]|sort|join('-') }}{{ 'a b'|replace(' ', '_') }}{{ none|default('d', true) }}{{ missing }}",
        "{% macro m(x) %}<{{ x }}{{ caller() if caller }}>{% endmacro %}{% call m(1) %}in{% endcall %}{{ m(2) }}",
        "{% for x in [[1, [2]]] recursive %}{{ loop(x) if x is iterable else x }}{{ loop.last }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    ],
)
def test_what_templates_use_is_as_in_transformers(template: str):
    tokenizer = tiny.make_tokenizer("llama")
    wanted = tokenizer.apply_chat_template(VALUES["messages"], chat_template=template, tokenize=False)
    assert sandbox.render(template, VALUES | {"add_generation_prompt": False}) == wanted


def test_a_long_conversation_has_room():
    turns = [{"role": "user", "content": "长" * 3_000_000}]
    assert len(sandbox.render("{{ messages[0].content + '.' }}", VALUES | {"messages": turns})) == 3_000_001


def test_threads_are_metered_apart():
    done: list[str] = []

    def one(number: int) -> None:
        turns = [{"role": "user", "content": f"{number}"}]
        done.append(
            sandbox.render("{% for i in range(2000) %}{{ messages[0].content }}{% endfor %}", {"messages": turns})
        )

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == sorted(str(number) * 2000 for number in range(8))
