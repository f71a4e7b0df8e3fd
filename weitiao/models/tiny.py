"""Tiny random models with real configurations, real tokenizers and chat templates of the family's own kind.

    folder = make("llama", tmp_path)        # a complete folder that loads like any other
    model = make("qwen3", seed=1)           # the model alone, in memory

They know nothing; they exist so that every path of the project runs in milliseconds on the architecture that will
really be used. The same family and seed give the same bytes. The templates are written for this project in the
style of each family, with its traits: Llama 2 has no tools, Qwen 3 writes an empty thought into the last turn only,
Mistral puts the tools before the last question, Gemma refuses a system turn, GLM ends a turn with the next role,
Phi-3 closes a finished conversation with its end token, ChatGLM (the first) writes the mask and <sop> behind everything
that was said.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao.errors import InputError, t
from weitiao.models.shape import auto_class, quiet

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
TEMPLATES = Path(__file__).parent / "templates"


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
    chat: str = ""  # the template's file; base models have none
    normalizer: str = ""
    split: str = ""  # the family's own pattern for cutting text into words, where it has one

    @property
    def template(self) -> str | None:
        """The chat template's text."""
        return (TEMPLATES / f"{self.chat}.jinja").read_text(encoding="utf-8") if self.chat else None


SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"initializer_range": 0.1}  # wide enough that the logits of a random model differ clearly
DECODER = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 1024}
ENCODER = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
END_OF_TEXT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
LLAMA_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHATML_SPECIAL = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MISTRAL_TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
GLM_ROLES = ("<|user|>", "<|observation|>")
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}

GLM = Family(
    "GlmConfig",
    DECODER | {"head_dim": 16},
    {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    ("[gMASK]", "<sop>", "<|system|>", "<|assistant|>", *GLM_ROLES),
    prefix=("[gMASK]", "<sop>"),
    stops=GLM_ROLES,
    chat="glm",
)
QWEN2 = Family(
    "Qwen2Config",
    DECODER | {"tie_word_embeddings": True},
    CHATML_SPECIAL,
    ("<|im_start|>",),
    stops=("<|endoftext|>",),
    chat="qwen2",
    normalizer="NFC",
    split=QWEN_SPLIT,
)
QWEN3 = replace(QWEN2, config="Qwen3Config", sizes=DECODER | {"head_dim": 32}, chat="qwen3")

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "initializer_range": 0.1}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        END_OF_TEXT,
    ),
    "llama": Family("LlamaConfig", DECODER, LLAMA_SPECIAL, prefix=("<s>",), chat="llama2"),
    "llama3": Family(
        "LlamaConfig",
        DECODER | {"tie_word_embeddings": True},
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        prefix=("<|begin_of_text|>",),
        stops=("<|end_of_text|>",),
        chat="llama3",
    ),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "mistral": Family(
        "MistralConfig",
        DECODER | {"sliding_window": 512},
        LLAMA_SPECIAL,
        ("[INST]", "[/INST]", "[TOOL_CALLS]", *MISTRAL_TOOLS),
        prefix=("<s>",),
        chat="mistral",
    ),
    "gemma": Family(
        "GemmaConfig",
        DECODER | {"head_dim": 32, "num_key_value_heads": 1},
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        ("<start_of_turn>", "<end_of_turn>"),
        prefix=("<bos>",),
        stops=("<end_of_turn>",),
        chat="gemma",
    ),
    "glm": GLM,
    "glm4": replace(GLM, config="Glm4Config"),
    "phi": Family("PhiConfig", DECODER | {"num_key_value_heads": 4}, END_OF_TEXT),
    "phi3": Family(
        "Phi3Config",
        DECODER | {"sliding_window": 512},
        {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"},
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        stops=("<|end|>",),
        chat="phi3",
    ),
    "qwen2_moe": replace(
        QWEN2, config="Qwen2MoeConfig", sizes=DECODER | EXPERTS | {"shared_expert_intermediate_size": 96}
    ),
    "qwen3_moe": replace(QWEN3, config="Qwen3MoeConfig", sizes=QWEN3.sizes | EXPERTS | {"norm_topk_prob": True}),
    "bloom": Family(
        "BloomConfig",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1},
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    ),
    "rwkv": Family(
        "RwkvConfig",
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 1024},
        END_OF_TEXT,
    ),
    "chatglm": Family(
        "ChatGLMConfig",
        SIZES | {"max_position_embeddings": 1024, "mask_token_id": 3, "gmask_token_id": 4},
        {"pad_token": "<pad>", "bos_token": "<sop>", "eos_token": "<eop>"},
        ("[MASK]", "[gMASK]"),
        suffix=("[gMASK]", "<sop>"),
        chat="chatglm",
    ),
    "bert": Family(
        "BertConfig",
        ENCODER,
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
    "roberta": Family(
        "RobertaConfig",
        ENCODER | {"max_position_embeddings": 514},  # two of which no token has: padding's, and the one before it
        {
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
            "cls_token": "<s>",
            "sep_token": "</s>",
        },
        prefix=("<s>",),
        suffix=("</s>",),
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto_class(settings).from_config(settings).eval()


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
