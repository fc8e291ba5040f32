"""A tokenizer of single characters whose tokens fit the vocabulary of the tiny models."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")  # 0, 1, 2, 3, as the tiny configs have them
_CHARACTERS = string.ascii_letters + string.digits + " \n.,;:!?'\"()-/&%$@#*+=<>[]_"


def tiny_tokenizer(*, pair_separator: bool = False) -> Any:
    """Return a Hugging Face tokenizer of less than 96 tokens, one per character.

    Args:
        pair_separator: Join texts as `<bos> first <eos> second <eos>`, as classifiers of BERT's kind do.

    Returns:
        The tokenizer; unknown characters become `<unk>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*_SPECIAL, *_CHARACTERS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    if pair_separator:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>",
            pair="<bos> $A <eos> $B:1 <eos>:1",
            special_tokens=[("<bos>", 1), ("<eos>", 2)],
        )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    if not pair_separator:
        inputs.remove("token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=64, model_input_names=inputs, **names
    )


def save_tiny_tokenizer(folder: str | Path, *, pair_separator: bool = False) -> Path:
    """Write `tiny_tokenizer` into a model folder.

    Args:
        folder: The folder; it may hold a tiny model.
        pair_separator: See `tiny_tokenizer`.

    Returns:
        The folder.
    """
    tiny_tokenizer(pair_separator=pair_separator).save_pretrained(folder)
    return Path(folder)
