"""Random dialogues, tokenizers of every kind and public chat templates, for the tests that compare ids."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from chatrlhf.conversation import Prompt, Turn

# Control tokens of public templates; thoughts are marked by tokens that are not special, as most models have them.
CONTROL = [
    *("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"),
    *("<|system|>", "<|end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[gMASK]", "<sop>", "<|observation|>", "<｜User｜>", "<｜Assistant｜>"),
    *("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
]
THOUGHTS = ["<think>", "</think>"]
TEXTS = [
    "Hello, how are you? I am fine, thank you.",
    "What is two and two? It is four.",
    "The quick brown fox jumps over the lazy dog.",
    "Human: tell me about the river. Assistant: the river is long and cold.",
    "user system assistant model start end of turn think\n\n## Heading\n\n1. one\n2. two",
] * 20
WORDS = ["hello", "what", "river", "snow", "the", "a", "is", "of", "night", "42", "3.5", "naïve", "日本語", "🙂", "é"]
WORDS += ["\u00a0", "x=1", "don't", "#tag", "<b>", "{y}", "%", "\n"]


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One trained on a few lines, of a kind: byte-level, SentencePiece-like (two), WordPiece-like, Unigram."""
    made = MAKERS[kind]()
    made.add_tokens(THOUGHTS)
    return made


def _wrapped(made: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | tokens
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **named)
    wrapped.add_special_tokens({"additional_special_tokens": [each for each in CONTROL if each not in named.values()]})
    return wrapped


def _byte_level() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=CONTROL, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return _wrapped(made)


def _metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """As transformers makes Llama's and Mistral's: blanks before a text, bytes for what is unknown, BOS before all."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    letters = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=letters, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    stored = json.loads(made.to_str())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] in CONTROL]
    if scheme == "prepend":  # the older form, whose blank is a normalizer's
        stored["pre_tokenizer"] = None
        made = Tokenizer.from_str(json.dumps(stored))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made = Tokenizer.from_str(json.dumps(stored))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    opening = ("<s>", made.token_to_id("<s>"))
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [opening])
    return _wrapped(made)


def _word_pieces() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=CONTROL, show_progress=False)
    )
    return _wrapped(made)


def _unigram() -> PreTrainedTokenizerFast:
    """As T5's and XLM-R's are."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=CONTROL, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return _wrapped(made)


MAKERS = {
    "byte-level": _byte_level,
    "Metaspace first": lambda: _metaspace("first"),
    "Metaspace always": lambda: _metaspace("always"),
    "Prepend": lambda: _metaspace("prepend"),
    "WordPiece": _word_pieces,
    "Unigram": _unigram,
}

# Written from their public form.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}"
    "{% else %}{% set content = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
WRITTEN = {"chatml": CHATML, "llama2": LLAMA2, "zephyr": ZEPHYR}
SHIPPED = [
    "qwen3",
    "qwen3_5_think",
    "qwen2_5",
    "glm4moe",
    "lfm2",
    "lfm2_2_5",
    "llama3",
    "llama3_1",
    "llama3_2",
    "gemma",
]
SHIPPED += ["gemma3", "phi3", "deepseek_r1_distill", "deepseekv3", "nemotron_3_nano", "cohere", "gptoss"]


def public_template(name: str) -> str | None:
    """A public chat template; None where this release of trl does not ship it."""
    if name in WRITTEN:
        return WRITTEN[name]
    import trl

    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8") if path.exists() else None


def dialogues(count: int, seed: int = 0) -> Iterator[tuple[Prompt, str]]:
    """Prompts and replies: one turn or several, system texts, thoughts, blanks at the ends, any character."""
    chance = random.Random(seed)

    def text() -> str:
        words = " ".join(chance.choices(WORDS, k=chance.randrange(1, 8)))
        return chance.choice(["", "", "", " ", "\n", "  "]) + words + chance.choice(["", "", "", " ", "\n", " \n\n"])

    def reply() -> str:
        thought = chance.choice(["", "", f"<think>\n{text().strip()}\n</think>\n\n", f"<think>{text()}</think>"])
        return thought + text()

    for _ in range(count):
        turns = [Turn("user", text())]
        for _ in range(chance.choice([0, 0, 1, 2])):
            turns += [Turn("assistant", reply()), Turn("user", text())]
        system = chance.choice([text(), text(), text(), ""]) if chance.random() < 0.3 else None
        yield Prompt(tuple(turns), system=system), reply()


def messages_of(prompt: Prompt, reply: str | None = None) -> list[dict[str, str]]:
    """As transformers' users write them."""
    messages = [{"role": "system", "content": prompt.system}] if prompt.system is not None else []
    messages += [{"role": turn.role, "content": turn.text} for turn in prompt.turns]
    return messages + ([{"role": "assistant", "content": reply}] if reply is not None else [])
