"""Tuning methods: one file each; a method is a frozen model of options with the answers of ``base.Method``."""

from pathlib import Path

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


def of(folder: Path) -> Method:
    """The method that a PEFT folder was made with, as far as our options can say it."""
    values = adapters.read_config(folder)
    method = next((method for method in METHODS.values() if method.peft_type == values["peft_type"]), Peft)
    return method.described(values)
