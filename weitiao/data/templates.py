"""Chat templates as files: a model's own, one that a person names, and ours for models that have none for the purpose.

``weitiao-plain`` is readable text with no special token but the tokenizer's own eos, which ends every assistant turn,
so that it works with any tokenizer as it is. Its few marker words are the role names of the chat format itself,
whatever the language of the conversation; a call is the JSON object in ``<tool_call>`` tags that Hermes and Qwen
models write.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from weitiao.errors import InputError, t
from weitiao.runs import write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE_FILE = "chat_template.jinja"
RECORD_FILE = "weitiao_template.json"

PLAIN = """\
{%- if bos_token %}{{ bos_token }}{% endif %}
{%- if tools %}
    {{- '### tools\\n' + (tools | map(attribute='function') | list | tojson) + '\\n' }}
    {{- '<tool_call>\\n{"name": "…", "arguments": {…}}\\n</tool_call>\\n\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '### ' + message.role + '\\n' }}
    {%- if message.content %}
        {{- message.content | trim }}
        {%- if message.tool_calls %}{{ '\\n' }}{% endif %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- if not loop.first %}{{ '\\n' }}{% endif %}
        {{- '<tool_call>\\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' }}
        {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
    {%- endfor %}
    {%- if message.role == 'assistant' %}
        {{- eos_token + '\\n' }}
    {%- else %}
        {{- '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}
"""

FALLBACK = "weitiao-plain"
TEMPLATES: dict[str, str] = {FALLBACK: PLAIN}


def own_template(tokenizer: PreTrainedTokenizerFast, tools: bool) -> str | None:
    """The tokenizer's own template; of several, the one for tools where tools are needed. InputError if its folder says
    that the model was tuned with another one."""
    if not tokenizer.chat_template:
        return None
    try:
        template = tokenizer.get_chat_template(tools=[{}] if tools else None)
    except ValueError as error:
        raise InputError(f"{tokenizer.name_or_path}: {error}") from None
    if tokenizer.name_or_path:
        _check_record(Path(tokenizer.name_or_path), template)
    return template


def named_template(name: str) -> str:
    """The text of a template given by its name or as a Jinja file."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        message = "data.chat_template: {name} is neither a Jinja file nor one of {names}"
        raise InputError(t(message, name=name, names=", ".join(TEMPLATES))) from None


def save_template(folder: Path, template: str, name: str) -> None:
    """Write ``chat_template.jinja``, which every server reads, and its name and hash, so that a change is noticed."""
    write_atomic(folder / TEMPLATE_FILE, template)
    write_atomic(folder / RECORD_FILE, json.dumps({"name": name, "sha256": _sha256(template)}, indent=2) + "\n")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_record(folder: Path, template: str) -> None:
    try:
        known = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if known != _sha256(template):
        message = "{folder}: {file} is not the template that this model was tuned with; put it back, or name one to use"
        raise InputError(t(message, folder=folder, file=TEMPLATE_FILE))
