"""Tiny random models with real configurations, real tokenizers and chat templates of the family's own kind.

    folder = make("llama", tmp_path)        # a complete folder that loads like any other
    model = make("qwen3", seed=1)           # the model alone, in memory

They know nothing; they exist so that every path of the project runs in milliseconds on the architecture that will
really be used. The same family and seed give the same bytes. The templates are written for this project in the
style of each family, with its traits: Llama 2 has no tools, Qwen 3 writes an empty thought into the last turn only,
Mistral puts the tools before the last question, Gemma refuses a system turn, GLM ends a turn with the next role,
ChatGLM (the first) writes the mask and <sop> behind everything that was said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao.errors import InputError, t
from weitiao.models.shape import quiet
from weitiao.weights import icetext

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SENTENCES = (
    "您好，请问有什么可以帮您？我想找一家酒店，评分在4.5分以上，价格300元左右。",
    "好的，为您找到三家酒店，都提供免费无线网和早餐，您想住在哪个区？",
    "谢谢，请告诉我酒店的电话和地址。不客气，祝您旅途愉快，再见！",
    "天气很好，我们去公园散步，然后回家吃饭。学习一门语言需要时间和耐心。",
    "The quick brown fox jumps over the lazy dog. What is the price of a room for two nights?",
    "A language model predicts the next token from the tokens before it, one after another.",
    'system user assistant tool {"name": "search_hotels", "arguments": {"rating_range_lower": 4.5}}',
)
TOKENIZER_SIZE = 384  # 256 bytes, the special tokens, and the merges that fit

LLAMA2_TEMPLATE = """\
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- for message in turns -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('user and assistant turns must alternate') -}}
{%- endif -%}
{%- if message.role == 'user' -%}
{{- bos_token + '[INST] ' + (messages[0].role == 'system' and loop.first and
    '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' or '') + message.content.strip() + ' [/INST]' -}}
{%- else -%}
{{- ' ' + message.content.strip() + ' ' + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

LLAMA3_TEMPLATE = """\
{{- bos_token -}}
{%- set first_user = namespace(seen=false) -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' -}}
{%- elif message.tool_calls -%}
{%- if message.tool_calls | length > 1 -%}{{- raise_exception('only one call in a turn') -}}{%- endif -%}
{%- set call = message.tool_calls[0].function -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' -}}
{%- else -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
{%- if tools and message.role == 'user' and not first_user.seen -%}
{%- set first_user.seen = true -%}
{{- 'Functions you may call; to call one, write {"name": its name, "parameters": its arguments}:\\n\\n' -}}
{%- for tool in tools -%}{{- (tool | tojson) + '\\n\\n' -}}{%- endfor -%}
{%- endif -%}
{{- message.content | trim + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

CHATML_TOOLS = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' + (system + '\\n\\n' if system else '') -}}
{{- '# Tools\\n\\nThe functions at hand:\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\\n</tools>\\n\\nA call is one JSON object with name and arguments inside a tag:\\n' -}}
{{- '<tool_call>\\n{"name": <name>, "arguments": <arguments>}\\n</tool_call><|im_end|>\\n' -}}
{%- elif system -%}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- endif -%}
"""
CHATML_CALLS = """\
{%- if message.content and message.tool_calls -%}{{- '\\n' -}}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
"""
CHATML_RESULT = """\
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""
QWEN2_TEMPLATE = (
    CHATML_TOOLS
    + """\
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' + (message.content or '') -}}
"""
    + CHATML_CALLS
    + CHATML_RESULT
    + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}\n"
)
QWEN3_TEMPLATE = (
    CHATML_TOOLS
    + """\
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- set thought = message.reasoning_content | default('', true) -%}
{%- if loop.index0 > last.user and (loop.last or thought) -%}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- message.content or '' -}}
"""
    + CHATML_CALLS
    + CHATML_RESULT
    + """\
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
)

MISTRAL_TEMPLATE = """\
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' -%}
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- if tools and loop.index0 == last.user -%}
{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}
{%- endif -%}
{{- '[INST] ' + (system if loop.index0 == last.user else '') + message.content + '[/INST]' -}}
{%- elif message.role == 'tool' -%}
{{- '[TOOL_RESULTS] ' + ({'content': message.content} | tojson) + '[/TOOL_RESULTS]' -}}
{%- elif message.tool_calls -%}
{{- '[TOOL_CALLS] [' -}}
{%- for call in message.tool_calls -%}
{{- (', ' if not loop.first else '') + '{"name": "' + call.function.name + '", "arguments": ' -}}
{{- (call.function.arguments | tojson) + (', "id": "' + call.id + '"' if call.id else '') + '}' -}}
{%- endfor -%}
{{- ']' + eos_token -}}
{%- elif message.role == 'assistant' -%}
{{- ' ' + message.content + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

GEMMA_TEMPLATE = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('this model has no system turn') -}}{%- endif -%}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('user and assistant turns must alternate') -}}
{%- endif -%}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
{{- message.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

GLM_TEMPLATE = """\
{{- '[gMASK]<sop>' -}}
{%- if tools -%}
{{- '<|system|>\\nFunctions you may call:' -}}
{%- for tool in tools -%}{{- '\\n\\n## ' + (tool.function or tool).name + '\\n\\n' + (tool | tojson) -}}{%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{- '<|observation|>\\n' + message.content -}}
{%- else -%}
{%- if message.content or not message.tool_calls -%}
{{- '<|' + message.role + '|>\\n' + message.content -}}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{{- '<|assistant|>' + call.function.name + '\\n' + (call.function.arguments | tojson) -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Family:
    """How a family is made: its configuration class and sizes, its special tokens, its chat template."""

    config: str
    sizes: dict[str, Any]
    special: dict[str, str]
    more_special: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()  # what the tokenizer itself puts before every text
    suffix: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()  # end-of-turn tokens beside eos
    template: str | None = None
    normalizer: str = ""
    split: str = ""  # the family's own pattern for cutting text into words, where it has one


SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"initializer_range": 0.1}  # wide enough that the logits of a random model differ clearly
DECODER = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 1024}
LLAMA_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHATML_SPECIAL = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MISTRAL_TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
GLM_ROLES = ("<|user|>", "<|observation|>")

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "initializer_range": 0.1}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    ),
    "llama": Family("LlamaConfig", DECODER, LLAMA_SPECIAL, prefix=("<s>",), template=LLAMA2_TEMPLATE),
    "llama3": Family(
        "LlamaConfig",
        DECODER | {"tie_word_embeddings": True},
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        prefix=("<|begin_of_text|>",),
        stops=("<|end_of_text|>",),
        template=LLAMA3_TEMPLATE,
    ),
    "qwen2": Family(
        "Qwen2Config",
        DECODER | {"tie_word_embeddings": True},
        CHATML_SPECIAL,
        ("<|im_start|>",),
        stops=("<|endoftext|>",),
        template=QWEN2_TEMPLATE,
        normalizer="NFC",
        split=QWEN_SPLIT,
    ),
    "qwen3": Family(
        "Qwen3Config",
        DECODER | {"head_dim": 32},
        CHATML_SPECIAL,
        ("<|im_start|>",),
        stops=("<|endoftext|>",),
        template=QWEN3_TEMPLATE,
        normalizer="NFC",
        split=QWEN_SPLIT,
    ),
    "mistral": Family(
        "MistralConfig",
        DECODER | {"sliding_window": 512},
        LLAMA_SPECIAL,
        ("[INST]", "[/INST]", "[TOOL_CALLS]", *MISTRAL_TOOLS),
        prefix=("<s>",),
        template=MISTRAL_TEMPLATE,
    ),
    "gemma": Family(
        "GemmaConfig",
        DECODER | {"head_dim": 32, "num_key_value_heads": 1},
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        ("<start_of_turn>", "<end_of_turn>"),
        prefix=("<bos>",),
        stops=("<end_of_turn>",),
        template=GEMMA_TEMPLATE,
    ),
    "glm": Family(
        "GlmConfig",
        DECODER | {"head_dim": 16},
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        ("[gMASK]", "<sop>", "<|system|>", "<|assistant|>", *GLM_ROLES),
        prefix=("[gMASK]", "<sop>"),
        stops=GLM_ROLES,
        template=GLM_TEMPLATE,
    ),
    "chatglm": Family(
        "ChatGLMConfig",
        SIZES | {"max_position_embeddings": 1024, "mask_token_id": 3, "gmask_token_id": 4},
        {"pad_token": "<pad>", "bos_token": "<sop>", "eos_token": "<eop>"},
        ("[MASK]", "[gMASK]"),
        suffix=("[gMASK]", "<sop>"),
        template=icetext.TEMPLATE,
    ),
    "bert": Family(
        "BertConfig",
        SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
        prefix=("[CLS]",),
        suffix=("[SEP]",),
        normalizer="Lowercase",
    ),
}


def _family(name: str) -> Family:
    """The family called ``name``; InputError lists those there are."""
    if name not in FAMILIES:
        raise InputError(t("no tiny model {name}; there are {names}", name=name, names=", ".join(FAMILIES)))
    return FAMILIES[name]


def make_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the family's special tokens, trained on a few built-in sentences."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    kind = _family(name)
    special = list(dict.fromkeys([*kind.special.values(), *kind.more_special]))
    tokenizer = Tokenizer(models.BPE())
    if kind.normalizer:
        tokenizer.normalizer = getattr(normalizers, kind.normalizer)()
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not kind.split)
    if kind.split:
        words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(kind.split), behavior="isolated"), words])
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if kind.prefix or kind.suffix:
        wrapping = (*kind.prefix, *kind.suffix)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*kind.prefix, "$A", *kind.suffix]),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in wrapping],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=list(kind.more_special),
        chat_template=kind.template,
        model_max_length=kind.sizes.get("max_position_embeddings", kind.sizes.get("n_positions", 512)),
        **kind.special,
    )


def make_model(name: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **config: Any) -> PreTrainedModel:
    """The family's model with random float32 weights from ``seed``; ``config`` overrides the tiny sizes."""
    import torch
    import transformers

    from weitiao.models.chatglm import register

    kind = _family(name)
    stops = [tokenizer.convert_tokens_to_ids(token) for token in kind.stops]
    eos = [tokenizer.eos_token_id, *stops] if stops else tokenizer.eos_token_id
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos}
    vocab_size = (len(tokenizer) // 64 + 1) * 64  # more rows than tokens, as in most published models
    options = kind.sizes | ids | {"vocab_size": vocab_size, "dtype": "float32"} | config
    settings = (getattr(transformers, kind.config, None) or register())(**options)
    of = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return of.from_config(settings).eval()


def make(family: str, folder: str | Path | None = None, seed: int = 0, **config: Any) -> Any:
    """A tiny model of a family: written to ``folder`` (its Path is returned), or the model itself without one.

    ``config`` overrides sizes (``num_hidden_layers=4``). InputError for a family that is not in ``FAMILIES``.
    """
    tokenizer = make_tokenizer(family)
    model = make_model(family, tokenizer, seed, **config)
    if folder is None:
        return model
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path
