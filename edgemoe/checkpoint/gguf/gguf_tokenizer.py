"""The tokenizer of a GGUF file, built by transformers from the vocabulary in its metadata."""

from __future__ import annotations

from typing import Any

from edgemoe.checkpoint.gguf.gguf_file import GgufFile

DEFAULT_SPLITS = ("gpt-2", "default", "olmo", "dolma", "")
"""Ways of splitting texts that byte-level BPE has of itself."""
DIGITS_APART = r"\p{N}"
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
GLM4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)
MORE_SPLITS: dict[str, tuple[str, ...]] = {
    "deepseek-v3": DEEPSEEK,
    "glm4": GLM4,
    "chatglm-bpe": GLM4,
    "refact": (DIGITS_APART,),
    "starcoder": (DIGITS_APART,),
    "command-r": (DIGITS_APART,),
    "smollm": (DIGITS_APART,),
}
"""Ways that transformers does not read: expressions that a text is split by one after the other.

`DIGITS_APART` is followed by the splitting of GPT-2.
"""


def has_vocabulary(file: GgufFile) -> bool:
    """Whether the file has a vocabulary; without one prompts must be token ids."""
    return bool(file.metadata.get("tokenizer.ggml.tokens"))


def tokenizer_of(file: GgufFile) -> Any:
    """A fast tokenizer with the special tokens and the chat template of the file.

    Raises ValueError for a vocabulary that is not read, or a way of splitting texts that is not known.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    if not hasattr(mapping, "GGUF_TOKENIZER_MAPPING"):
        raise ValueError("this transformers does not read it: upgrade it to 5.23, or give a folder as model_config=")
    metadata = file.metadata
    described = {
        name: metadata[f"tokenizer.{key}"]
        for key, name in mapping.GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in metadata
    }
    if described.get("tokenizer_type") == "gpt2":
        # A vocabulary of single bytes has none, and a writer leaves empty lists out.
        described.setdefault("merges", [])
    split = str(described.get("pre_tokenizer_type", ""))
    byte_level = described.get("tokenizer_type") == "gpt2"
    if byte_level and split not in {*mapping.GGUF_PRE_TOKENIZER_SPLITS, *DEFAULT_SPLITS, *MORE_SPLITS}:
        raise ValueError(
            f"it splits texts by {split}, which is not read: give a folder with its tokenizer as model_config="
        )
    backend, _ = mapping.convert_gguf_tokenizer(file.architecture, described)
    if byte_level and split in MORE_SPLITS:
        backend.pre_tokenizer = _splitting(MORE_SPLITS[split])
    tokens = described["tokens"]
    special = {
        name: tokens[metadata[f"tokenizer.ggml.{key}"]]
        for name, key in mapping._SPECIAL_TOKENS.items()
        if metadata.get(f"tokenizer.ggml.{key}") is not None
    }
    sentencepiece = described.get("tokenizer_type") == "llama"
    begins = bool(metadata.get("tokenizer.ggml.add_bos_token", sentencepiece)) and "bos_token" in special
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=metadata.get("tokenizer.chat_template"), **special
    )
    if begins:
        _begin_with(made, special["bos_token"])
    return made


def _splitting(expressions: tuple[str, ...]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in expressions]
    more = expressions == (DIGITS_APART,)
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=more)])


def _begin_with(tokenizer: Any, token: str) -> None:
    """Texts begin with `token`, as llama.cpp begins them."""
    from tokenizers import processors

    number = tokenizer.convert_tokens_to_ids(token)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B"], special_tokens=[(token, number)]
    )
