"""Checks of a template with a tokenizer, on a few of the data's own rows: ids, BOS, EOS, unknown tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatrlhf.conversation import Prompt
from chatrlhf.data.encoder import IGNORED, Encoder
from chatrlhf.data.stage_rows import Demonstration
from chatrlhf.data.templates import arguments_of
from chatrlhf.data.tokenization import Tokenization
from chatrlhf.runtime.check_result import CheckResult, judged

UNKNOWN = 0.01  # share of tokens


def check_template_ids(encoder: Encoder, prompts: Sequence[Prompt]) -> CheckResult:
    """Prompts have the ids that `apply_chat_template` gives to whoever uses the trained model without this package.

    Prompts whose own text looks like a special token are left out: here it is text, and transformers makes it a token.
    """
    control = Tokenization(encoder.tokenizer).control
    plain = [prompt for prompt in prompts if control is None or not control.search(_all_text(prompt))]
    others = [prompt for prompt in plain if encoder.prompt(prompt) != _by_transformers(encoder, prompt)]
    measured = f"{len(plain) - len(others)} of {len(plain)} prompts have the ids of apply_chat_template"
    if others:
        measured += f" (not {others[0].place or repr(others[0].text[:40])})"
    remedy = "name another template: with this one the trained model would see other ids wherever it is used"
    return judged("template ids", measured, remedy, fail=bool(others))


def check_bos(encoder: Encoder, prompts: Sequence[Prompt]) -> CheckResult:
    """Prompts open with as many BOS tokens as the tokenizer puts before a text: one or none."""
    bos, name = encoder.tokenizer.bos_token_id, "template BOS"
    if bos is None:
        return CheckResult(name, "pass", "the tokenizer has no BOS token")
    wanted = int(encoder.tokenizer("a")["input_ids"][:1] == [bos])
    counts = [_leading(encoder.prompt(prompt), bos) for prompt in prompts]
    # A template may open with BOS where the tokenizer alone does not: then the model was trained with it.
    wrong = [count for count in counts if count > 1 or count < wanted]
    measured = f"{len(counts) - len(wrong)} of {len(counts)} prompts open with one BOS token" + (
        "" if wanted else " or none, as the tokenizer does"
    )
    if wrong:
        measured += f"; others with {max(wrong)}"
    remedy = (
        "take bos_token out of the template, the tokenizer adds one"
        if max(wrong, default=0) > 1
        else ("put bos_token at the beginning of the template")
    )
    return judged(name, measured, remedy, fail=bool(wrong))


def check_eos(encoder: Encoder, rows: Sequence[Demonstration]) -> CheckResult:
    """Exactly one EOS of each reply is trained, and it is the last token: without it a policy never ends."""
    eos, wrong = encoder.tokenizer.eos_token_id, 0
    for row in rows:
        labels = encoder.labelled(row.prompt, row.completion, "completion")[1]
        trained = [label for label in labels if label != IGNORED]
        wrong += trained.count(eos) != 1 or trained[-1] != eos
    shown = encoder.tokenizer.eos_token
    measured = f"{len(rows) - wrong} of {len(rows)} replies end with the one EOS that is trained ({shown})"
    remedy = "name another template: this one writes EOS inside a reply, and a rollout would end there"
    return judged("template EOS", measured, remedy, fail=wrong > 0)


def check_unknown(name: str, tokenizer: Any, texts: Sequence[str]) -> CheckResult:
    """A tokenizer has tokens for what the data say."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    total = sum(map(len, rows))
    unknown = 0 if tokenizer.unk_token_id is None else sum(row.count(tokenizer.unk_token_id) for row in rows)
    measured = f"{len(tokenizer):,} tokens; {unknown:,} of {total:,} tokens of {len(texts)} rows are unknown to it"
    remedy = "name a model whose tokenizer knows the language of the data"
    return judged(name, measured, remedy, warn=unknown > UNKNOWN * total)


def _by_transformers(encoder: Encoder, prompt: Prompt) -> list[int]:
    template = encoder.saved_template
    arguments = arguments_of(prompt, template.takes_narrative)
    return list(
        encoder.tokenizer.apply_chat_template(
            arguments.pop("messages"),
            chat_template=template.source,
            add_generation_prompt=True,
            return_dict=False,
            **arguments,
        )
    )


def _all_text(prompt: Prompt) -> str:
    parts = (prompt.system, prompt.narrative, prompt.reply_name)
    return "\n".join([*filter(None, parts), *(f"{turn.name or ''}\n{turn.text}" for turn in prompt.turns)])


def _leading(ids: Sequence[int], bos: int) -> int:
    return next((i for i, id in enumerate(ids) if id != bos), len(ids))
