"""The tokenizer of a Q-Former's text branch: a BERT's, with [DEC]."""

from typing import Any

from bridges.embedded import fetch
from bridges.vision import EMBEDDED

DEC_TOKEN = "[DEC]"
"""First token of text that is to be written, where BERT has [CLS] (BLIP-2 section 3.1)."""


def bert_source(name: str) -> str:
    """A hub name or folder as it is; ``embedded:minilm-l6`` as the folder that it is kept in."""
    return str(fetch(name.removeprefix(EMBEDDED))) if name.startswith(EMBEDDED) else name


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a BERT, with [DEC] as its last token.

    Args:
        name: a hub name, a local folder, or ``embedded:minilm-l6``.

    Raises:
        ValueError: a tokenizer without [CLS] and [SEP].
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert_source(name))
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError(
            f"found a {type(tokenizer).__name__} without [CLS] and [SEP] at {name!r}; expected "
            "a BERT's: the Q-Former reads text as BERT does"
        )
    tokenizer.add_special_tokens({"bos_token": DEC_TOKEN})
    return tokenizer
