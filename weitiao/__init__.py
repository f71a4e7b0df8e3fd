"""weitiao 微调: fine-tune a language model on the machine you have.

    import weitiao

    result = weitiao.run(weitiao.Recipe(data={"train": "rows.jsonl"}, output="runs/first"))
    tuned = weitiao.open_model("runs/first")

Names are imported from their rooms when they are first used, so ``import weitiao`` loads no heavy library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weitiao.data.render import Renderer as Renderer
    from weitiao.data.rows import Call as Call
    from weitiao.data.rows import Chat as Chat
    from weitiao.data.rows import Message as Message
    from weitiao.data.rows import Text as Text
    from weitiao.data.sources import DataOptions as DataOptions
    from weitiao.errors import InputError as InputError
    from weitiao.errors import RunError as RunError
    from weitiao.errors import WeitiaoError as WeitiaoError
    from weitiao.evaluate.tasks import EvaluateOptions as EvaluateOptions
    from weitiao.generate.sample import SampleOptions as SampleOptions
    from weitiao.methods import METHODS as METHODS
    from weitiao.methods.io import Tuned as Tuned
    from weitiao.methods.io import open_model as open_model
    from weitiao.models.load import ModelOptions as ModelOptions
    from weitiao.recipe import Recipe as Recipe
    from weitiao.recipe import run as run
    from weitiao.runs import Run as Run
    from weitiao.train.options import TrainOptions as TrainOptions
    from weitiao.train.tasks import TaskOptions as TaskOptions

__version__ = "0.1.0"

_ROOMS = {
    "Call": "data.rows",
    "Chat": "data.rows",
    "DataOptions": "data.sources",
    "EvaluateOptions": "evaluate.tasks",
    "InputError": "errors",
    "METHODS": "methods",
    "Message": "data.rows",
    "ModelOptions": "models.load",
    "Recipe": "recipe",
    "Renderer": "data.render",
    "Run": "runs",
    "RunError": "errors",
    "SampleOptions": "generate.sample",
    "Text": "data.rows",
    "TaskOptions": "train.tasks",
    "TrainOptions": "train.options",
    "Tuned": "methods.io",
    "WeitiaoError": "errors",
    "open_model": "methods.io",
    "run": "recipe",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its room."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'weitiao' has no attribute {name!r}")
    return getattr(import_module(f"weitiao.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_ROOMS, "__version__"])
