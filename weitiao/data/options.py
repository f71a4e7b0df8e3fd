"""The section ``data`` of a recipe: where rows come from, what they mean, and how they become examples.

options = DataOptions(train=["own.jsonl", {"path": "general.jsonl", "repeat": 0.5}], validation=0.1)
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from weitiao.config import Options
from weitiao.data.layouts import COLUMN_NAMES, template_slots
from weitiao.errors import t


class SourceOptions(Options):
    """One source of training rows, and how much of it is taken."""

    path: str = Field(description="a file of rows, a link to one, hub:OWNER/NAME[:FILE or SPLIT], or generate:NAME")
    repeat: float = Field(
        default=1.0, gt=0, description="how often each of its rows is seen; 0.5 takes a half of them, 3 each one thrice"
    )
    weight: float | None = Field(
        default=None, gt=0, description="its share of all rows, beside the other sources' weights; repeat is the most"
    )


class DataOptions(Options):
    """Where rows come from, what they mean, and how they become examples."""

    train: str | list[str | SourceOptions] | None = Field(
        default=None,
        description="files of training rows, links to files, hub:OWNER/NAME[@REVISION][:FILE or SPLIT], or "
        "generate:NAME; in a list also {path, repeat, weight}: how often a row is seen, and the source's share of all "
        "rows",
    )
    validation: float | str | None = Field(
        default=0.1, description="share of the training rows, or a file; none: 0 or null"
    )
    test: float | str | None = Field(default=None, description="share of the training rows, or a file")
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt", "text", "labelled", "crosswoz",
        "jsonl", "json", "csv", "tsv", "parquet", "txt",
    ] = Field(default="auto", description="a layout of rows, or a kind of file; auto finds both")  # fmt: skip
    columns: dict[str, str] = Field(default={}, description="the file's own column names: {prompt: 问题, answer: 回答}")
    template: str | None = Field(
        default=None, description="the prompt, with the row's columns in braces: 问：{question}"
    )
    folder: str | None = Field(default=None, description="the folder (or zip files) of format crosswoz")
    tools: str | None = Field(
        default=None, description="a JSON file of tool schemas for every conversation that brings none"
    )
    patch: str | None = Field(
        default=None, description="edits of rows that weitiao data review wrote; the files themselves stay"
    )
    max_length: Literal["auto"] | int = Field(
        default="auto", description="tokens of an example at most; auto takes the model's"
    )
    train_on: Literal["assistant", "last", "all"] = Field(default="assistant", description="whose tokens are trained")
    replay: str | list[str] | None = Field(
        default=None, description="general rows mixed in against forgetting: files, or generate:NAME"
    )
    replay_share: float = Field(
        default=0.1, gt=0, lt=1, description="share of the mixed training rows that replayed ones make up"
    )
    memory_map: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="auto: rows of files of 64 MiB and more are made tokens on disk, once, and mapped from there, so "
        "that they need not fit into memory; on: of any file; off: rows are held in memory",
    )
    skip_bad: bool = Field(default=False, description="leave bad rows out, with a count, instead of stopping")
    allow_truncated: float = Field(default=0.01, ge=0, le=1, description="share of answers that max_length may cut")
    chat_template: str | None = Field(
        default=None, description="a Jinja file, or the name of a fallback, instead of the model's own"
    )

    @field_validator("validation", "test", mode="before")
    @classmethod
    def _share_as_text(cls, value: Any) -> Any:
        """``data.validation=0.2`` on a command line is a share, not a file called 0.2."""
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    @field_validator("validation", "test")
    @classmethod
    def _share_in_range(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError(t("a share is at least 0 and less than 1"))
        return value

    @field_validator("max_length")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError(t("at least 1 token"))
        return value

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        unknown = [name for name in value if name not in COLUMN_NAMES]
        if unknown:
            known = ", ".join(COLUMN_NAMES)
            raise ValueError(t("unknown: {unknown}; known: {known}", unknown=", ".join(unknown), known=known))
        return value

    @field_validator("template")
    @classmethod
    def _well_formed(cls, value: str | None) -> str | None:
        if value is not None and not template_slots(value):
            raise ValueError(t("has no slot such as {question}, so every prompt would be the same"))
        return value

    @field_validator("train")
    @classmethod
    def _all_weighted_or_none(cls, value: Any) -> Any:
        weights = [one.weight for one in value if isinstance(one, SourceOptions)] if isinstance(value, list) else []
        if any(weights) and (None in weights or len(weights) < len(value)):
            raise ValueError(t("one source has a weight and another has none; give each one, or none"))
        return value

    @model_validator(mode="after")
    def _shares_leave_something(self) -> DataOptions:
        if sum(share for share in (self.validation, self.test) if isinstance(share, float)) >= 1:
            raise ValueError(t("validation and test leave nothing to train on"))
        return self

    @property
    def sources(self) -> list[SourceOptions]:
        """What ``train`` names, each with its repeat and weight."""
        named = [self.train] if isinstance(self.train, str) else self.train or []
        return [SourceOptions(path=one) if isinstance(one, str) else one for one in named]
