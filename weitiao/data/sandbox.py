"""Chat templates, which are programs from outside, rendered with limits on time, memory and output.

    text = render(template, {"messages": [...], "tools": None, "add_generation_prompt": True})

The environment is the one that transformers renders in (Jinja's immutable sandbox with transformers' own filters and
globals), so that a model's own template writes the same bytes; what is added only counts. Jinja's sandbox keeps a
template from Python's objects and from files, and lets it loop for days or write ``"a" * 10**10``. Here every loop and
every call asks the clock, whatever makes a longer text or list is measured before it is made, and what one rendering
has made in all is bounded. The bounds grow with the conversation that is rendered.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateRuntimeError
from jinja2.compiler import CodeGenerator
from jinja2.nodes import Dict, For, List, Tuple
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from weitiao.errors import InputError, t

SECONDS = 0.2  # of the processor, for one rendering; a conversation of a hundred messages takes 3 ms
MADE_BYTES = 48 << 20  # what one rendering may make in all
LONGEST = 1 << 20  # characters or items of one value, and of the output
SOURCE_CHARACTERS = 1 << 16  # of a template: the longest published ones have 30,000
WIDEST = 10_000  # a number that says how wide or how many
DEEPEST = 200  # levels of lists and tables in each other
BITS = 4096  # of a whole number
ITEM_BYTES = 56  # what an item of a list takes, at least
LIGHT = (str, int, float, type(None))
CONTAINERS = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
HEAVY = (dict, Namespace, *CONTAINERS)
BETWEEN = 64  # steps between two looks at the clock
LEFT_OUT = ("lipsum", "urlize", "wordwrap", "pprint", "xmlattr", "striptags")  # slow or large, and in no chat template
FORMAT = re.compile(r"\d{5,}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{")  # a width that is huge, or comes from elsewhere


class Stopped(TemplateRuntimeError):
    """A template went beyond a limit."""


class Meter:
    """What one rendering may still do. ``given``: characters and items of the conversation."""

    def __init__(self, given: int):
        self.end = time.thread_time() + SECONDS
        self.longest = LONGEST + 4 * given
        self.left_bytes = MADE_BYTES + 16 * given
        self.steps = 0

    def step(self, count: int = 1) -> None:
        """A step, or one that does the work of several."""
        self.steps += count
        if self.steps >= BETWEEN:
            self.steps = 0
            if time.thread_time() > self.end:
                raise Stopped(t("it runs for more than {milliseconds} ms", milliseconds=round(SECONDS * 1000)))

    def allow(self, length: int) -> None:
        """Stopped where a value of so many characters or items is too long to be made."""
        if length > self.longest:
            raise Stopped(t("it makes a value of {length} characters or items", length=length))

    def weigh(self, value: Any) -> tuple[int, int]:
        """Characters and items of a value, and how deep it goes; what is in it twice counts twice. Stopped if it is too
        large to be printed, compared or hashed in a moment."""
        units, depth, level = 0, 0, [value]
        while level:
            depth += 1
            self.step(len(level) >> 4)
            if depth > DEEPEST:
                raise Stopped(t("it nests values {depth} deep", depth=depth))
            inner: list[Any] = []
            for one in level:
                if isinstance(one, str | bytes):
                    units += len(one)
                    continue
                units += 1
                if isinstance(one, dict):
                    inner += one
                    inner += one.values()
                elif isinstance(one, CONTAINERS):
                    inner += one
                elif isinstance(one, Namespace):
                    inner += vars_of(one)
                if units + len(inner) > self.longest:
                    self.allow(units + len(inner))
            level = inner
        return units, depth

    def take(self, value: Any) -> Any:
        """A value that was made: it counts, and is given back."""
        self.step()
        if isinstance(value, str | bytes):
            self.left_bytes -= sys.getsizeof(value)
            if len(value) > 4096:
                self.allow(len(value))
                self.step(len(value) >> 12)
        elif isinstance(value, LIGHT):
            return value
        elif isinstance(value, HEAVY):
            self.left_bytes -= ITEM_BYTES * self.weigh(value)[0]
        if self.left_bytes < 0:
            raise Stopped(t("it takes more than {size} MB of memory", size=MADE_BYTES >> 20))
        return value


def vars_of(namespace: Namespace) -> list[Any]:
    """The values in a namespace, which gives its own attributes to nobody."""
    return list(object.__getattribute__(namespace, "_Namespace__attrs").values())


# ---- what makes something longer, and how long it would be -----------------------------------------------------------


def _narrow(meter: Meter, *values: Any, **named: Any) -> None:
    for value in (*values[1:], *named.values()):
        if isinstance(value, int | float) and abs(value) > WIDEST:
            raise Stopped(t("it asks for a width of {width}", width=str(value)[:40]))


def _replace(meter: Meter, text: Any = "", old: Any = "", new: Any = "", *rest: Any, **named: Any) -> None:
    text, old, new = str(text), str(named.get("old", named.get("s", old))), str(named.get("new", new))
    found = text.count(old) if old else len(text) + 1
    meter.allow(len(text) + found * len(new))


def _join(meter: Meter, items: Any = (), between: Any = "", *rest: Any, **named: Any) -> None:
    if hasattr(items, "__len__"):
        meter.allow(len(items) * len(str(named.get("d", between))) + meter.weigh(items)[0])


def _indent(meter: Meter, text: Any = "", width: Any = 4, *rest: Any, **named: Any) -> None:
    width = named.get("width", width)
    _narrow(meter, text, width)
    meter.allow((str(text).count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))


def _tojson(meter: Meter, value: Any = None, *options: Any, **named: Any) -> None:
    units, depth = meter.weigh(value)
    widths = [len(one) if isinstance(one, str) else one for one in (*options, *named.values()) if one is not True]
    separators = [part for one in (*options, *named.values()) if isinstance(one, list | tuple) for part in one]
    widest = max([0, *(one for one in widths if type(one) is int), *(len(str(part)) for part in separators)])
    meter.allow(units * max(depth * widest // 4, 1))


def _format(meter: Meter, text: Any = "", *values: Any, **named: Any) -> None:
    if FORMAT.search(str(text)):
        raise Stopped(t("it asks for a width of {width}", width=str(text)[:40]))
    meter.weigh([*values, *named.values()])


def _refused(meter: Meter, *values: Any, **named: Any) -> None:
    raise Stopped(t("it uses a method that no chat template needs"))


def _join_method(meter: Meter, between: Any = "", items: Any = ()) -> None:
    _join(meter, items, between)


GROWTH: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("center", "batch", "slice", "truncate", "round"), _narrow),
    **{"replace": _replace, "join": _join, "indent": _indent, "tojson": _tojson, "format": _format},
}
METHODS: dict[str, Callable[..., None]] = {  # of texts, bytes and numbers
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"), _narrow),
    **{"replace": _replace, "join": _join_method, "format": _format, "format_map": _format, "translate": _refused},
}


# ---- the environment -------------------------------------------------------------------------------------------------


class _Counting(CodeGenerator):
    """Jinja's code with a step in every loop, and with what is written as a list, or joined by ~, measured."""

    def __init__(self, *values: Any, **named: Any):
        super().__init__(*values, **named)
        self.bodies: list[Any] = []

    def visit_For(self, node: For, frame: Any) -> None:
        self.bodies.append(node.body)
        super().visit_For(node, frame)

    def blockvisit(self, nodes: Iterable[Any], frame: Any) -> None:
        if any(nodes is body for body in self.bodies):
            self.writeline("environment.step()")
        super().blockvisit(nodes, frame)

    def visit_List(self, node: List, frame: Any) -> None:
        self._made(super().visit_List, node, frame)

    def visit_Dict(self, node: Dict, frame: Any) -> None:
        self._made(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Concat(self, node: Any, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _made(self, visit: Callable[[Any, Any], None], node: Any, frame: Any) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


class Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with a meter."""

    code_generator_class = _Counting
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        theirs = _compile_jinja_template("").environment
        super().__init__(
            trim_blocks=theirs.trim_blocks,
            lstrip_blocks=theirs.lstrip_blocks,
            extensions=[type(extension) for extension in theirs.extensions.values()],
            finalize=self.printed,
            autoescape=False,
        )
        self.meter: ContextVar[Meter | None] = ContextVar("meter", default=None)
        known = {name: one for name, one in theirs.filters.items() if name not in LEFT_OUT}
        self.filters = {name: self._measured(name, one) for name, one in known.items()}
        self.globals = {name: one for name, one in theirs.globals.items() if name not in LEFT_OUT}

    def metered(self) -> Meter:
        """The meter of this rendering. While a template is compiled there is none: then nothing is computed."""
        if (meter := self.meter.get()) is None:
            raise Stopped("compiling")
        return meter

    def _measured(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is asked before it makes something long, and counted afterwards."""
        given = 1 if getattr(work, "jinja_pass_arg", None) is not None else 0

        @functools.wraps(work)
        def measured(*values: Any, **named: Any) -> Any:
            meter = self.metered()
            for value in (*values[given:], *named.values()):
                if not isinstance(value, LIGHT):
                    meter.weigh(value)
            if grows := GROWTH.get(name):
                grows(meter, *values[given:], **named)
            return meter.take(work(*values, **named))

        return measured

    def step(self) -> None:
        """Once in every round of a loop."""
        self.metered().step()

    def made(self, value: Any) -> Any:
        """A list, tuple or table that the template writes down."""
        return self.metered().take(value)

    def joined(self, parts: tuple[Any, ...]) -> str:
        """What ``~`` makes."""
        meter = self.metered()
        meter.weigh(parts)
        return meter.take("".join([str(part) for part in parts]))

    def printed(self, value: Any) -> Any:
        """A value on its way to the output."""
        if not isinstance(value, str) and (meter := self.meter.get()):
            meter.weigh(value)
        return value

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """The output, or that of a macro or block, as it comes."""
        meter = self.meter.get()
        if meter is None:
            return "".join(parts)
        whole, length = [], 0
        for part in parts:
            length += len(part)
            meter.allow(length)
            meter.step()
            whole.append(part)
        return meter.take("".join(whole))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """+, *, ** and %, once it is known that the result is not too large."""
        meter = self.metered()
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            meter.allow(len(left) + len(right))
        elif operator == "%" and isinstance(left, str | bytes):
            _format(meter, left, right)
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            meter.allow(len(left) + len(right))
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if hasattr(one, "__len__") and isinstance(other, int):
                    meter.allow(len(one) * max(other, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            meter.allow(left.bit_length() * abs(right) * (meter.longest // BITS))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > BITS:
            raise Stopped(t("it computes with a number of more than {bits} bits", bits=BITS))
        return meter.take(result)

    def call(self, context: Any, function: Any, /, *values: Any, **named: Any) -> Any:  # type: ignore[override]
        """A call of a macro, a function of the environment, or a method of a value."""
        meter = self.metered()
        owner = getattr(function, "__self__", None)
        if owner is None:
            owner = getattr(getattr(function, "__wrapped__", None), "__self__", None)  # format comes wrapped
        if isinstance(owner, str | bytes | int) and (grows := METHODS.get(function.__name__)):
            grows(meter, owner, *values, **{name: one for name, one in named.items() if name[:1] != "_"})
        meter.step()
        return meter.take(super().call(context, function, *values, **named))


# ---- rendering -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> tuple[Environment, Any]:
    """A template's program; InputError for one that is too long, or no Jinja."""
    if len(source) > SOURCE_CHARACTERS:
        message = "the chat template has {length} characters, more than any has ({limit}); it is not run"
        raise InputError(t(message, length=len(source), limit=SOURCE_CHARACTERS))
    environment = Environment()
    try:
        return environment, environment.from_string(source)
    except Exception as error:  # whatever its compilation fails with, Python's own parser included
        reason = str(error) or type(error).__name__
        raise InputError(t("the chat template is no Jinja template: {reason}", reason=reason[:300])) from error


def render(template: str, values: Mapping[str, Any]) -> str:
    """What ``template`` makes of ``values``, plain data alone. InputError with the template's own words where it
    refuses them, and where it went beyond a limit."""
    environment, program = _compiled(template)
    meter = Meter(given=0)
    meter.longest = sys.maxsize  # a conversation may be as long as it is
    given, _ = meter.weigh(dict(values))
    token = environment.meter.set(Meter(given))
    try:
        return program.render(values)
    except Stopped as error:
        message = "the chat template was stopped: {reason}"
        raise InputError(t(message, reason=str(error))) from error
    except Exception as error:
        reason = str(error)[:2000] or type(error).__name__
        raise InputError(t("the chat template refuses this conversation: {reason}", reason=reason)) from error
    finally:
        environment.meter.reset(token)
