"""Tuning methods: one file each; a method is a frozen model of options with the answers of ``base.Method``."""

from weitiao.methods.base import Method
from weitiao.methods.freeze import Freeze
from weitiao.methods.full import Full
from weitiao.methods.lora import LoRA

METHODS: dict[str, type[Method]] = {"full": Full, "freeze": Freeze, "lora": LoRA}
