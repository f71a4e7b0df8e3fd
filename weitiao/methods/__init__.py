"""Tuning methods: one file each; a method is a frozen model of options with the answers of ``base.Method``."""

from pathlib import Path
from typing import Any

from weitiao.methods import adapters
from weitiao.methods.adalora import AdaLoRA
from weitiao.methods.adapter import Adapter
from weitiao.methods.base import Method
from weitiao.methods.expand import Expand
from weitiao.methods.freeze import Freeze
from weitiao.methods.full import Full
from weitiao.methods.head import Head
from weitiao.methods.lora import LoRA
from weitiao.methods.p_tuning import PTuning
from weitiao.methods.peft import Peft
from weitiao.methods.prefix_tuning import PrefixTuning
from weitiao.methods.prompt_tuning import PromptTuning

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "freeze": Freeze,
    "expand": Expand,
    "head": Head,
    "prompt_tuning": PromptTuning,
    "p_tuning": PTuning,
    "prefix_tuning": PrefixTuning,
    "adapter": Adapter,
    "lora": LoRA,
    "adalora": AdaLoRA,
    "peft": Peft,
}

PRESETS: dict[str, dict[str, Any]] = {  # names that stand for options of several sections
    "qlora": {"method": {"name": "lora"}, "model": {"quantize": "nf4", "double_quantization": True}},
}
NEW_RATE = 6e-4  # of weights that know nothing yet (GPT-2's small shape: Brown et al., arXiv 2005.14165, table 2.1)


def name_of(section: Any) -> Any:
    """Which method a recipe's section means: ``lora`` if it names none."""
    return section.get("name", "lora") if isinstance(section, dict) else getattr(section, "name", None)


def implied(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values with what its method's name stands for, and, where no learning rate is given, the method's."""
    name = str(name_of(values.get("method", {})))
    for key, options in PRESETS.get(name, {}).items():
        given = dict(values.get(key) or {})
        values = values | {key: given | options if key == "method" else options | given}
    model, train = values.get("model", {}), values.get("train", {})
    if isinstance(train, dict) and "learning_rate" not in train:
        new = (model.get("config") if isinstance(model, dict) else getattr(model, "config", None)) is not None
        own = METHODS.get(str(name_of(values.get("method", {}))), Method).learning_rate
        values = values | {"train": train | {"learning_rate": NEW_RATE if new else own}}
    return values


def of(folder: Path) -> Method:
    """The method that a PEFT folder was made with, as far as our options can say it."""
    values = adapters.read_config(folder)
    method = next((method for method in METHODS.values() if method.peft_type == values["peft_type"]), Peft)
    return method.described(values)
