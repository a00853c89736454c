"""Deep checks, which train: microbatches add up, two steps repeat, a few rows are learned by heart.

The models are the stages' own and their losses, too; the learning rate is one that a model of this width takes, since
what is asked here is whether anything can be learned at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chatrlhf.config.schema import ActorConfig
from chatrlhf.conversation import Prompt
from chatrlhf.data.collate import pad_right
from chatrlhf.data.encoder import IGNORED, Encoder
from chatrlhf.data.row_checks import sampled
from chatrlhf.data.stage_rows import Preference, ScoredCompletion
from chatrlhf.models.loading.backbone import decoder_start, is_encoder_decoder
from chatrlhf.models.loading.lora import has_adapters
from chatrlhf.models.reward_model import RewardScorer
from chatrlhf.models.scalar_head import state_size
from chatrlhf.runtime.check_result import CheckResult, judged
from chatrlhf.runtime.device import DTYPES, resolve_precision
from chatrlhf.sharding.launch import microbatching
from chatrlhf.stages.context import encoder_of
from chatrlhf.stages.sft import microbatch_loss
from chatrlhf.stages.sft_seq2seq import PairCollator, reply_loss
from chatrlhf.tools.check.session import Session, same_random_numbers

ACTOR_ROWS, ACTOR_STEPS = 8, 60
LEARNED, LEARNED_BY_ADAPTERS = 0.5, 0.8  # share of the first loss that a few rows fall below
KNOWN = 0.1  # nats a token: rows that are known already
PAIRS, PAIR_STEPS = 32, 200
LR_TIMES_WIDTH, ADAPTERS_LR = 0.2, 10.0  # AdamW's learning rate times the hidden size; of adapters so much more
# Of the norm of a difference: sums in another order round in another way.
ARITHMETIC = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}

EncodedRows = list[tuple[list[int], list[int]]]  # ids and labels


def check_actor_training(session: Session, model: nn.Module, tokenizer: Any) -> Iterator[CheckResult]:
    """The ACTOR stage's gradient and steps on a few of its rows. The model is changed."""
    config, device = session.config.actor_config, session.device
    precision = resolve_precision(config.precision, device)
    encoder = encoder_of(session.config, model, tokenizer)
    rows = _short_rows(session, encoder)
    micro, _ = microbatching(config, "actor_config", 1)
    loss_of = summed_loss(model, config, tokenizer.pad_token_id)
    tokens = sum(label != IGNORED for _, labels in rows for label in labels)

    def loss(part: EncodedRows) -> Tensor:
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            return loss_of(part) / tokens

    def pieces(size: int) -> list[EncodedRows]:
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()  # as the stage has them
    model.eval()  # without dropout
    whole_gradient, parts = (_gradient(weights, loss, pieces(size)) for size in (len(rows), 1))
    yield check_microbatches("ACTOR batch arithmetic", whole_gradient, parts, len(rows), precision)
    del whole_gradient, parts

    def steps(number: int) -> Iterator[float]:
        model.train()
        return descend(weights, lambda: [(loss, piece) for piece in pieces(micro)], _rate(model), number)

    before = [weight.detach().cpu().clone() for weight in weights]
    digests = []
    for _ in range(2):
        _put_back(weights, before)
        with same_random_numbers(session.config.seed):
            list(steps(2))
        digests.append(_digest(weights))
    yield judged(
        "ACTOR determinism",
        f"two steps made twice from the same weights end {'bit-equal' if len(set(digests)) == 1 else 'differently'}",
        "a run cannot be reproduced bit for bit here; num_threads: 1, or another GPU kernel (attn_implementation), may",
        warn=len(set(digests)) > 1,
    )
    share = LEARNED_BY_ADAPTERS if has_adapters(model) else LEARNED
    yield overfits_rows(steps(ACTOR_STEPS), len(rows), share)


def summed_loss(model: nn.Module, config: ActorConfig, pad_id: int) -> Callable[[EncodedRows], Tensor]:
    """The ACTOR stage's loss in nats, summed over the labels of rows that are padded to the longest."""
    if is_encoder_decoder(model.config):
        collate = PairCollator(pad_id, decoder_start(model.config))

        def of_replies(rows: EncodedRows) -> Tensor:
            batch = collate([{"input_ids": ids, "labels": labels} for ids, labels in rows])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            labels = batch.pop("labels")
            return reply_loss(model(**batch), labels, 1, config.label_smoothing_factor)

        return of_replies
    loss = microbatch_loss(model, config)

    def of_rows(rows: EncodedRows) -> Tensor:
        ids, mask = pad_right([ids for ids, _ in rows], pad_id)
        labels, _ = pad_right([labels for _, labels in rows], IGNORED)
        return loss(ids.to(model.device), mask.to(model.device), labels.to(model.device))

    return of_rows


def overfits_rows(losses: Iterable[float], rows: int, share: float = LEARNED) -> CheckResult:
    """The loss of a few rows falls to a share of where it began.

    Args:
        losses: in nats a token, a step each; no more are asked for than needed.
    """
    seen: list[float] = []
    for loss in losses:
        seen.append(loss)
        if loss <= max(share * seen[0], KNOWN):
            break
    return judged(
        "ACTOR learns a few rows",
        f"the loss of {rows} rows went from {seen[0]:.2f} to {seen[-1]:.2f} nats a token in {len(seen) - 1} steps",
        f"it should fall below {share:.0%} of that: look at what is trained (chatrlhf data show), and whether "
        "weights are frozen",
        fail=not seen[-1] <= max(share * seen[0], KNOWN),
    )


def check_reward_training(session: Session, scorer: RewardScorer) -> Iterator[CheckResult]:
    """The reward model learns a few of its pairs by heart. It is changed."""
    assert session.inputs.reward is not None
    pairs = some_pairs(session.inputs.reward.train)
    if not pairs:
        yield CheckResult("REWARD learns pairs", "fail", "no two rows differ in score", "score the data again")
        return
    model, device = scorer.model, session.device
    precision = resolve_precision(session.config.reward_config.precision, device)
    micro, _ = microbatching(session.config.reward_config, "reward_config", 1)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()  # without dropout, as TRL trains
    ids = [[scorer.encode(prompt, reply) for prompt, reply in pair] for pair in pairs]
    right: list[bool] = []

    def loss(part: list[list[list[int]]]) -> Tensor:
        rows, mask = pad_right([row for pair in part for row in pair], scorer.tokenizer.pad_token_id)
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            scores = model(rows.to(device), mask.to(device)).logits[:, 0].float().view(-1, 2)
        margins = scores[:, 0] - scores[:, 1]
        right.extend((margins > 0).tolist())
        return -nn.functional.logsigmoid(margins).sum() / len(ids)

    def accuracies() -> Iterator[float]:
        parts = [ids[i : i + micro] for i in range(0, len(ids), micro)]
        for _ in descend(weights, lambda: [(loss, part) for part in parts], _rate(model.trunk), PAIR_STEPS):
            yield sum(right) / len(right)
            right.clear()

    yield orders_pairs(accuracies(), len(pairs))


def orders_pairs(accuracies: Iterable[float], pairs: int) -> CheckResult:
    """A few pairs are all in the right order after some steps.

    Args:
        accuracies: before each step; no more are asked for than needed.
    """
    seen: list[float] = []
    for accuracy in accuracies:
        seen.append(accuracy)
        if accuracy == 1:
            break
    return judged(
        "REWARD learns pairs",
        f"{seen[-1]:.0%} of {pairs} pairs are in the right order after {len(seen) - 1} steps",
        "look for pairs that contradict each other, and whether weights are frozen; a template may also hide the reply",
        fail=seen[-1] < 1,
    )


def some_pairs(rows: Sequence[Any]) -> list[list[tuple[Prompt, str]]]:
    """A few pairs, the better one first: preferences, or scored replies with one of a lower score."""
    few = [row for row in sampled(rows, 2 * PAIRS)]
    if isinstance(few[0], Preference):
        return [[(row.prompt, row.chosen), (row.prompt, row.rejected)] for row in few[:PAIRS]]
    ordered: list[ScoredCompletion] = sorted(few, key=lambda row: row.score)
    half = len(ordered) // 2
    both = zip(ordered[-half:], ordered[:half], strict=True) if half else ()
    return [
        [(better.prompt, better.completion), (worse.prompt, worse.completion)]
        for better, worse in both
        if better.score > worse.score
    ]


def check_microbatches(
    name: str, whole: Sequence[Tensor], parts: Sequence[Tensor], rows: int, precision: str
) -> CheckResult:
    """The gradient of all rows at once and one by one, tensor by tensor, is the same."""
    pairs = list(zip(whole, parts, strict=True))
    norm = sum(float(a.double().square().sum()) for a, _ in pairs) ** 0.5
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) ** 0.5
    share = difference / norm if norm > 0 else float("nan")
    return judged(
        name,
        f"gradients of {rows} rows at once and one by one differ by {share:.1e} of their norm ({norm:.2g})",
        "the model reads a row differently beside others: set attn_implementation, or micro_batch_size to 1; a norm of "
        "0 means that nothing is trained",
        fail=not share <= ARITHMETIC[precision],
    )


def descend(
    weights: list[nn.Parameter], parts: Callable[[], list[tuple[Callable[[Any], Tensor], Any]]], lr: float, steps: int
) -> Iterator[float]:
    """AdamW on the sum of the parts' losses; yields it as it was before each step, and at the end."""
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    for _ in range(steps + 1):
        optimizer.zero_grad()
        total = 0.0
        for loss, part in parts():
            value = loss(part)
            value.backward()
            total += float(value.detach())
        yield total
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()


def _gradient(
    weights: list[nn.Parameter], loss: Callable[[EncodedRows], Tensor], pieces: list[EncodedRows]
) -> list[Tensor]:
    for weight in weights:
        weight.grad = None
    for piece in pieces:
        loss(piece).backward()
    return [torch.zeros(1) if weight.grad is None else weight.grad.cpu() for weight in weights]


def _short_rows(session: Session, encoder: Encoder) -> EncodedRows:
    """A few rows of the ACTOR stage within the context."""
    assert session.inputs.actor is not None
    config = session.config.actor_config
    rows = [encoder.cut_actor_row(row, config.loss_on) for row in sampled(session.inputs.actor.train, ACTOR_ROWS)]
    return [row for row in rows if any(label != IGNORED for label in row[1])]


def _rate(model: nn.Module) -> float:
    return LR_TIMES_WIDTH / state_size(model) * (ADAPTERS_LR if has_adapters(model) else 1.0)


@torch.no_grad()
def _put_back(weights: list[nn.Parameter], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def _digest(weights: list[nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
