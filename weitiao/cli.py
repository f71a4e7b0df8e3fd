"""The command line: one table of verbs; parse, call, turn an error into one line.

    weitiao train recipes/hotel-lora.yaml train.epochs=1

Each verb is a function of its own room, imported when it is called, so ``weitiao --help`` loads no heavy library. Data
goes to stdout, words to stderr; exit 0 done, 1 the work failed, 2 bad usage or bad input. ``--debug`` shows tracebacks.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from weitiao.errors import InputError, WeitiaoError, redact, t
from weitiao.machine import ranks

GARBAGE = 100_000, 20, 20  # new objects between searches for cycles: at Python's 700 they take a second of the imports
INTERRUPTED = 130  # what typer makes of Ctrl-C in a verb
WAITING = {"GOMP_SPINCOUNT": "1000"}  # turns of a thread that waits for another before it sleeps: GNU's 300,000 keep a
# core that another process could use, and the thread that is waited for may be what it keeps from running


HELP_WORDS = (
    "Usage:",
    "Arguments:",
    "Options:",
    "Show this message and exit.",
    "[default:",
    "required]",
)  # typer's own


class Verb(NamedTuple):
    """One row of the table: the words that call it, where its function lives, one line of help."""

    words: str
    target: str
    help: str


VERBS = (
    Verb("env", "weitiao.machine.env:env_verb", "what this machine can do, and what to do about what it cannot"),
    Verb("fetch", "weitiao.weights.fetch:verb", "get a model's or a data set's files, resumed and verified"),
    Verb("inspect", "weitiao.weights.inspect:verb", "the tensors of a folder or file of any form, without loading it"),
    Verb(
        "convert",
        "weitiao.weights.convert:verb",
        "foreign layouts (ChatGLM2/3, Llama) to one that loads; forms of file",
    ),
    Verb("tokenizer train", "weitiao.data.tokenizer:train_verb", "train a tokenizer on text"),
    Verb("tokenizer extend", "weitiao.data.extend:verb", "give a model tokens for new text"),
    Verb("tokenizer compare", "weitiao.data.tokenizer_compare:verb", "tokenizers side by side, on the same texts"),
    Verb("data show", "weitiao.data.show:verb", "rows in colour: which tokens are trained"),
    Verb("data stats", "weitiao.data.stats:verb", "lengths, balance, duplicates, leaks, what max_length would cut"),
    Verb("data clean", "weitiao.data.clean:verb", "take out broken, empty, too long and double rows, and say why"),
    Verb("data mix", "weitiao.data.mix:verb", "several sources into one file, by repeat or by weight"),
    Verb("data augment", "weitiao.data.augment:verb", "more rows: by rules, by a model's rewriting, out of documents"),
    Verb("data review", "weitiao.data.review:verb", "accept, edit or reject rows by hand; edits are a patch file"),
    Verb("data split", "weitiao.data.split:verb", "rows into train, validation and test, by dialogue"),
    Verb("plan", "weitiao.recipe:plan_verb", "memory, disk and time of a recipe, before anything is loaded"),
    Verb("train", "weitiao.recipe:train_verb", "run a recipe: plan, tune, choose the best checkpoint, report"),
    Verb("sweep", "weitiao.sweep:verb", "one recipe by several methods, compared"),
    Verb("eval compare", "weitiao.evaluate.verb:compare_verb", "was tuning worth it: untuned, with examples, tuned"),
    Verb("eval", "weitiao.evaluate.verb:verb", "measure a run or a model"),
    Verb("report", "weitiao.plan.fact:verb", "the report of a run"),
    Verb("scaling", "weitiao.sweep:scaling_verb", "a scaling law from several runs, and what it says of a larger one"),
    Verb("merge", "weitiao.export.merge:verb", "an adapter into its base: a plain model folder"),
    Verb("chat", "weitiao.generate.chat:verb", "talk to a run or a model"),
    Verb("bench train", "weitiao.bench:train_verb", "tokens a second and memory of training here, beside the limit"),
    Verb("bench generate", "weitiao.bench:generate_verb", "tokens a second of answering here, beside the limit"),
    Verb("bench peers", "weitiao.bench:peers_verb", "the same training by other trainers, side by side"),
    Verb("demo", "weitiao.demo.main:verb", "the hotel assistant, from nothing to measured, offline"),
)


class Extras(NamedTuple):
    """What rooms to the left are given by name and may not import: generators of training rows, and tools to call."""

    generators: dict[str, Callable[[int], Any]]
    tools: dict[str, Callable[..., Any]]


def _later(target: str) -> Callable[..., Any]:
    """The function ``module:name``, imported when it is first called."""
    module, _, name = target.partition(":")
    return lambda *args, **options: getattr(import_module(module), name)(*args, **options)


def extras() -> Extras:
    """The demo's corpus and tools, under the names that recipes and ``--tools`` use."""
    return Extras(
        generators={
            "tiny-zh": _later("weitiao.demo.corpus:rows"),
            "tiny-zh-talks": _later("weitiao.demo.talks:talks"),
            "tiny-zh-searches": _later("weitiao.demo.talks:searches"),
        },
        tools={"hotel": _later("weitiao.demo.tools:toolset")},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; ``argv`` is without the program's name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    gc.set_threshold(*GARBAGE)
    _share_cores()
    if not debug:
        warnings.simplefilter("ignore")  # libraries' notes to their own callers
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return _fail(t("interrupted"), 1) if code == INTERRUPTED else code
    except BrokenPipeError:
        # The reader has gone (`weitiao env | head -1`): nothing more to say, nor at the interpreter's own last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail(t("interrupted"), 1)
    except WeitiaoError as error:
        _trace(debug)
        return error.exit_code if ranks.unheard(error) else _fail(str(error), error.exit_code)
    except Exception as error:
        _trace(debug)
        message = "{kind}: {problem} (not foreseen: --debug shows where it arose)"
        return _fail(t(message, kind=type(error).__name__, problem=error), 1)


def _share_cores() -> None:
    """How threads wait, before torch's OpenMP library is loaded and reads it; a person's own choice stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in WAITING.items():
            os.environ.setdefault(name, value)


def _trace(debug: bool) -> None:
    """Where the error at hand arose, without secrets."""
    if debug:
        print(redact(traceback.format_exc()), end="", file=sys.stderr)


def _fail(problems: str, code: int) -> int:
    """``error: …`` on stderr, a line for each problem."""
    for line in redact(problems).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


def _dispatch(arguments: list[str]) -> int:
    """Find the verb that the first words name and call it with the rest."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage(""))
        return 0
    if arguments[0] in ("--version", "-V"):
        from weitiao import __version__

        print(__version__)
        return 0
    for verb in VERBS:
        words = verb.words.split()
        if arguments[: len(words)] == words:
            return _call(verb, arguments[len(words) :])
    group = arguments[0]
    if any(verb.words.startswith(group + " ") for verb in VERBS):
        if len(arguments) == 1 or arguments[1] in ("--help", "-h"):
            print(usage(group))
            return 0
        raise _no_such_verb(arguments[1], group + " ")
    raise _no_such_verb(group, "")


def usage(group: str) -> str:
    """The table of verbs, or of those in one group (``data show``, ``data stats``)."""
    rows = [verb for verb in VERBS if verb.words.startswith(f"{group} ") or not group]
    width = max(len(verb.words) for verb in rows)
    lines = [t("usage: weitiao VERB [arguments]   (weitiao VERB --help tells each verb's options)"), ""]
    lines += [f"  {verb.words:<{width}}  {t(verb.help)}" for verb in rows]
    lines += ["", t("every verb takes --debug (tracebacks); --version prints the version")]
    return "\n".join(lines)


def _no_such_verb(word: str, group: str) -> InputError:
    from weitiao.config import nearest

    names = list(dict.fromkeys(v.words.removeprefix(group).split()[0] for v in VERBS if v.words.startswith(group)))
    listed = ", ".join(names)
    if near := nearest(word, names):
        return InputError(
            t('no such verb: {verb}; did you mean "{near}"? ({names})', verb=word, near=near, names=listed)
        )
    return InputError(t("no such verb: {verb} ({names})", verb=word, names=listed))


def _call(verb: Verb, arguments: list[str]) -> int:
    """Parse ``arguments`` by the type hints of the verb's function and call it."""
    from typer.exceptions import Exit, TyperException

    parser = command(verb)
    try:
        code = parser.main(arguments, f"weitiao {verb.words}", standalone_mode=False, obj=extras())
    except Exit as done:
        code = done.exit_code
    except TyperException as error:
        help_line = t("weitiao {verb} --help tells its options", verb=verb.words)
        options = [name for option in parser.params for name in option.opts if name.startswith("-")]
        raise InputError(f"{_misused(error, verb.words, options)} ({help_line})") from None
    return code if isinstance(code, int) else 0


def command(verb: Verb) -> Any:
    """The parser of a verb, by the type hints of its function, its help in the person's language."""
    import typer
    from typer.core import TyperCommand
    from typer.main import get_command

    class Command(TyperCommand):
        """One whose help page has its headings translated, too."""

        def get_help(self, ctx: Any) -> str:
            text = super().get_help(ctx)
            for english in HELP_WORDS:
                text = text.replace(english, t(english))
            return text

    module, _, name = verb.target.partition(":")
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(help=t(verb.help), cls=Command)(getattr(import_module(module), name))
    parser: Any = get_command(app)
    for option in parser.params:
        option.help = t(option.help)
    return parser


def _name(param: Any) -> str:
    """An option as it is written; an argument as the help shows it."""
    return param.opts[0] if param.opts[0].startswith("-") else param.metavar or param.opts[0].upper()


def _misused(error: Any, verb: str, options: Sequence[str]) -> str:
    """What is wrong with a command line, from the parser's own error."""
    from weitiao import config

    kind, message = type(error).__name__, error.format_message()
    param = getattr(error, "param", None)
    name = getattr(error, "option_name", "") or (param and _name(param))
    if kind == "MissingParameter":
        return t("{name}: is missing", name=name)
    if kind == "NoSuchOption":
        return f"{name}: {config.unknown(str(name), verb, options)}"
    if kind == "BadOptionUsage":
        return (
            t("{name}: takes no value", name=name) if "not take" in message else t("{name}: needs a value", name=name)
        )
    if kind == "BadParameter" and hasattr(error.__cause__, "errors"):
        return f"{name}: {config.wrong(error.__cause__.errors(include_url=False))}"
    if words := re.match(r"Got unexpected extra argument\S* \((.*)\)", message):
        return t("not expected here: {words}", words=words[1])
    return message
