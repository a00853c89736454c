"""Tokenizers: loaded with a model, or trained on the data for `model: tiny`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chatrlhf.errors import ConfigError, MissingError
from chatrlhf.errors.boundary import doing
from chatrlhf.models.loading.safe_config import refuse_large_texts
from chatrlhf.runtime.whole_folders import require_whole

EOS, PAD = "<|endoftext|>", "<|pad|>"


# Byte-level BPE takes a run of letters, digits, signs or blanks for one word, and reads all of it at each merge: a run
# of a hundred thousand takes minutes. Of a run beyond `LONGEST_WORD` characters only the beginning is learned from.
LONGEST_WORD = 256
LONG_WORD = re.compile(r"[^\W\d_]{N,}|\d{N,}|(?:[^\w\s]|_){N,}|\s{N,}".replace("N", str(LONGEST_WORD + 1)))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocab_size`` tokens; every text can be written with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator((_shortened(text) for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def _shortened(text: str) -> str:
    return LONG_WORD.sub(lambda found: found[0][:LONGEST_WORD], text) if len(text) > LONGEST_WORD else text


def load_tokenizer(name: str, key: str, **kwargs: Any) -> Any:
    """A tokenizer from a folder or the hub, with a pad token (EOS where it has none of its own).

    Encoders' tokenizers may close a text by a separator and have no EOS; it is theirs then.

    Raises:
        MissingError: it is not there. ConfigError, OutsideError: it cannot be loaded, or it has no EOS token.
    """
    require_whole(name)
    with doing(f"{key}: reading the tokenizer in", name, untrusted=True):
        refuse_large_texts(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **{"trust_remote_code": False} | kwargs)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            kind = MissingError if isinstance(error, OSError) else ConfigError
            raise kind(f"{key}: no tokenizer could be loaded from {name!r} ({reason})") from None
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{key}: the tokenizer of {name!r} has no EOS token, so no reply could ever end")
    if tokenizer.pad_token_id is None:
        # Safe here: masks are made with the tokens and never inferred from a pad id.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def same_tokenizer(first: Any, second: Any) -> bool:
    """Whether both give the same ids for every text: same vocabulary, same merges, same special tokens."""
    if first is second:
        return True
    if first.get_vocab() != second.get_vocab() or first.eos_token_id != second.eos_token_id:
        return False
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (first, second)]
    if None in backends:
        return type(first) is type(second)
    # Padding and truncation are left as the last call had them, so they are not compared.
    states = []
    for backend in backends:
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        states.append(copy.to_str())
    return states[0] == states[1]
