"""What a run computed, recomputed from its folders by plain transformers and peft: the oracle, and a description.

    python -I tests/oracle/recompute.py < questions.jsonl > answers.jsonl

A question names a function of this file and its arguments, an answer is what the function returns:

    {"ask": "sft_loss", "folder": "run/actor", "conversations": [[{"role": "user", "content": "Hello?"}, ...], ...]}

A folder is read as any user of transformers reads it: weights by an Auto class, ids by `apply_chat_template`. Rows go
through a model one by one, so that nothing here is padded, masked, packed or cached. The package that made the folders
cannot be imported.
"""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

CHECKED = "chatrlhf"


class Blocker:
    """Refuses to import the package whose results are checked."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == CHECKED:
            raise ImportError(f"the oracle does without {CHECKED}")


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocker())

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import cross_entropy, gelu, linear  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

Messages = list[dict[str, str]]


# ----- folders


def is_seq2seq(folder: str) -> bool:
    """Whether a folder's model is an encoder-decoder; adapters are what their base is."""
    adapters = Path(folder) / "adapter_config.json"
    base = json.loads(adapters.read_text())["base_model_name_or_path"] if adapters.exists() else folder
    return AutoConfig.from_pretrained(base).is_encoder_decoder


@lru_cache(maxsize=8)
def language_model(folder: str) -> Any:
    auto = AutoModelForSeq2SeqLM if is_seq2seq(folder) else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


@lru_cache(maxsize=8)
def tokenizer_of(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


# ----- ids


def prompt_ids(folder: str, messages: Messages) -> list[int]:
    """Messages up to a user's, and what asks for the reply."""
    return tokenizer_of(folder).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def reply_ids(folder: str, conversation: Messages) -> list[int]:
    """The last message's part of a conversation's ids: all that follow its prompt's, to the EOS."""
    tokenizer = tokenizer_of(folder)
    whole = tokenizer.apply_chat_template(conversation, return_dict=False)
    prompt = prompt_ids(folder, conversation[:-1])
    if whole[: len(prompt)] != prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]  # an encoder's prompt is closed where it is read alone
    assert whole[: len(prompt)] == prompt, "a conversation's ids do not begin with its prompt's"
    reply = whole[len(prompt) :]
    end = reply.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in reply else len(reply)
    return [*reply[:end], tokenizer.eos_token_id]


# ----- models at the tokens of a reply


def reply_states(model: Any, field: str, prompt: list[int], reply: list[int]) -> Tensor:
    """What a model gives where it predicts the reply, [R, .]; ``field`` is ``logits`` or ``last_hidden_state``.

    Entry t has seen the prompt and the reply's tokens before t. A decoder reads its start token for the first.
    """
    if model.config.is_encoder_decoder:
        read = [model.config.decoder_start_token_id, *reply[:-1]]
        given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([read])}
        return model(**given, use_cache=False)[field][0]
    return model(input_ids=torch.tensor([[*prompt, *reply]]), use_cache=False)[field][0, len(prompt) - 1 : -1]


def sampled_logits(logits: Tensor, sampling: dict[str, Any], tokenizer: Any) -> Tensor:
    """Logits of the distribution that rollouts are drawn from, [R, V].

    They are divided by the temperature; a pad token that is not EOS and ``forbidden_tokens`` are never drawn, EOS is
    not among the first ``min_new_tokens``.
    """
    logits = logits / sampling["temperature"]
    logits[:, forbidden_tokens(sampling, tokenizer)] = -torch.inf
    logits[: sampling["min_new_tokens"], tokenizer.eos_token_id] = -torch.inf
    return logits


def forbidden_tokens(sampling: dict[str, Any], tokenizer: Any) -> list[int]:
    return sorted({*sampling["forbidden_tokens"], tokenizer.pad_token_id} - {tokenizer.eos_token_id})


def new_token_limit(sampling: dict[str, Any], prompt: list[int]) -> int:
    """Tokens that a reply may have: those asked for, or those left of the context."""
    return min(sampling["max_new_tokens"], sampling["max_length"] - len(prompt))


# ----- what can be asked


def sft_loss(folder: str, conversations: list[Messages], ids_of: str) -> float:
    """Cross-entropy in nats a token, over the tokens of all replies, EOS included.

    A mixture of experts is trained on the balance of its experts, too: the model's own auxiliary loss is added.

    Args:
        ids_of: the folder whose tokenizer and template give the ids.
    """
    model = language_model(folder)
    rows = [(prompt_ids(ids_of, each[:-1]), reply_ids(ids_of, each)) for each in conversations]
    losses = [
        cross_entropy(reply_states(model, "logits", prompt, reply), torch.tensor(reply), reduction="none")
        for prompt, reply in rows
    ]
    return float(torch.cat(losses).mean()) + router_loss(model, [prompt + reply for prompt, reply in rows])


def router_loss(model: Any, rows: list[list[int]]) -> float:
    """The weighted balance of experts over a batch; 0 for a model that has none."""
    if not hasattr(model.config, "router_aux_loss_coef"):
        return 0.0
    width = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    balance = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    return float(model.config.router_aux_loss_coef * balance)


def scores(folder: str, replies: list[dict[str, Any]]) -> list[float]:
    """A reward model's scores: scale * head(state) + shift, the state of one token of the whole text.

    Args:
        replies: whole conversations, ``{"conversation": ...}``; or prompts with sampled ids, ``{"prompt": ...,
            "reply_ids": ...}``, which end with EOS where the reply was finished.
    """
    return [float(heads_output(folder, *_text(folder, reply))[-1]) for reply in replies]


def _text(folder: str, reply: dict[str, Any]) -> tuple[list[int], list[int]]:
    if "conversation" in reply:
        whole = reply["conversation"]
        ids = reply_ids(folder, whole)
        return prompt_ids(folder, whole[:-1]), ids if reply["finished"] else ids[:-1]
    return prompt_ids(folder, reply["prompt"]), reply["reply_ids"]


def heads_output(folder: str, prompt: list[int], reply: list[int]) -> Tensor:
    """What the head of a reward model or critic says behind each token, normalized; [tokens].

    A causal model is read behind each token of prompt and reply, an encoder at its first token. An encoder-decoder has
    prompt and reply in its encoder and is read at its decoder's start; a critic of one has the reply in its decoder and
    is read at the start token and behind each token of the reply.
    """
    settings, backbone, head = reward_model(folder)
    if settings["pooling"] == "reply":
        states = reply_states(backbone, "last_hidden_state", prompt, [*reply, 0])
    else:
        given = {"input_ids": torch.tensor([[*prompt, *reply]])}
        if settings["pooling"] == "start":
            given["decoder_input_ids"] = torch.tensor([[backbone.config.decoder_start_token_id]])
        states = backbone(**given, use_cache=False).last_hidden_state[0]
        states = states if settings["pooling"] == "last" else states[:1]
    if settings["mlp_size"]:
        states = gelu(linear(states, head["hidden.weight"], head["hidden.bias"]))
    return settings["scale"] * linear(states, head["out.weight"], head["out.bias"])[:, 0] + settings["shift"]


@lru_cache(maxsize=8)
def reward_model(folder: str) -> tuple[dict[str, Any], Any, dict[str, Tensor]]:
    """Settings, backbone and head of a reward model's or critic's folder."""
    settings = json.loads((Path(folder) / "reward_model.json").read_text())
    backbone = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return settings, backbone, load_file(Path(folder) / "reward_head.safetensors")


def rollout(
    policy: str,
    reference: str,
    critic: str | None,
    prompts: list[Messages],
    replies: list[list[int]],
    seed: int,
    sampling: dict[str, Any],
) -> dict[str, Any]:
    """What the models of a PPO step make of sampled replies.

    Args:
        critic: None: one that has learned nothing yet, whose values are 0.
        seed: of the random numbers that the replies are drawn by, one a token in rows of the longest limit.

    Returns:
        ``logprobs``, ``reference_logprobs``, ``entropy``, ``values``: a list a reply, a number a token; ``kl``: nats a
        reply, the mean over replies of the summed log-ratios; ``outside``: of each token, how far the random number of
        its draw lies outside of the token's share of the distribution, 0 where it is inside; ``finished``: whether each
        reply was ended by EOS; ``complete``: whether it ended there, or at its limit.
    """
    tokenizer = tokenizer_of(policy)
    found: dict[str, Any] = {name: [] for name in ("logprobs", "reference_logprobs", "entropy", "values", "outside")}
    ids_of = [prompt_ids(policy, prompt) for prompt in prompts]
    width = max(new_token_limit(sampling, prompt) for prompt in ids_of)
    random_numbers = torch.rand(len(prompts), width, generator=torch.Generator().manual_seed(seed))
    for prompt, reply, row in zip(ids_of, replies, random_numbers, strict=True):
        logits = reply_states(language_model(policy), "logits", prompt, reply)
        logprobs = sampled_logits(logits, sampling, tokenizer).log_softmax(dim=-1)
        logits = reply_states(language_model(reference), "logits", prompt, reply)
        reference_logprobs = sampled_logits(logits, sampling, tokenizer).log_softmax(dim=-1)
        at = torch.tensor(reply)[:, None]
        found["logprobs"].append(logprobs.gather(1, at)[:, 0].tolist())
        found["reference_logprobs"].append(reference_logprobs.gather(1, at)[:, 0].tolist())
        found["entropy"].append((-(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(dim=1)).tolist())
        # A token's value is what the head says behind the token before it.
        values = heads_output(critic, prompt, reply)[-len(reply) - 1 : -1] if critic else torch.zeros(len(reply))
        found["values"].append(values.tolist())
        # A token is drawn where the random number falls among the shares laid end to end.
        ends = logprobs.double().exp().cumsum(dim=1)
        upper = ends.gather(1, at)[:, 0]
        lower = upper - logprobs.double().exp().gather(1, at)[:, 0]
        number = row[: len(reply)].double()
        found["outside"].append(torch.maximum(lower - number, number - upper).clamp(min=0).tolist())
    ratios = [sum(own) - sum(other) for own, other in zip(found["logprobs"], found["reference_logprobs"], strict=True)]
    found["kl"] = sum(ratios) / len(ratios)
    found["finished"] = [reply[-1] == tokenizer.eos_token_id for reply in replies]
    found["complete"] = [
        tokenizer.eos_token_id not in reply[:-1] and (finished or len(reply) == new_token_limit(sampling, prompt))
        for prompt, reply, finished in zip(ids_of, replies, found["finished"], strict=True)
    ]
    return found


def greedy(folder: str, prompts: list[Messages], sampling: dict[str, Any]) -> list[list[int]]:
    """Greedy replies by `generate`, with their EOS; the folder says which token that is."""
    model, tokenizer = language_model(folder), tokenizer_of(folder)
    replies = []
    for prompt in (prompt_ids(folder, messages) for messages in prompts):
        said = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            use_cache=False,
            max_new_tokens=new_token_limit(sampling, prompt),
            min_new_tokens=sampling["min_new_tokens"],
            suppress_tokens=forbidden_tokens(sampling, tokenizer),
        )[0].tolist()
        replies.append(said[1:] if model.config.is_encoder_decoder else said[len(prompt) :])
    return replies


ASKED = {each.__name__: each for each in (sft_loss, scores, rollout, greedy)}


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(ASKED[question.pop("ask")](**question)), flush=True)
    assert CHECKED not in sys.modules


if __name__ == "__main__":
    main()
