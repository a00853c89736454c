"""Whether RL has what it needs: an actor that has learned, and a reward model that can tell replies apart."""

from __future__ import annotations

from collections.abc import Mapping

from chatrlhf.errors import NotTrainedError
from chatrlhf.stages.context import RunContext

AT_CHANCE = 0.95  # of ln V, the loss of one who knows nothing
LITTLE, NOTHING = 0.05, 0.005  # shares of the loss before, by which it has fallen
STILL_HIGH = 0.5  # of ln V: a model that was good before may fall by little


def check_readiness(ctx: RunContext, stage: str) -> None:
    """Before a stage that RL follows, and before RL, unless that continues from a checkpoint.

    Raises:
        NotTrainedError: RL would start from an actor that has learned nothing; or, where the configuration has that
            stop it, be led by a reward model that is no better than a coin.
    """
    if "RL" not in ctx.stages or stage not in ("REWARD", "RL") or (ctx.resume and ctx.manifest.has_begun("RL")):
        return
    keys, config = ctx.config.guards_config, ctx.config
    is_ours = ctx.trained("ACTOR", "actor", config.actor_config.model) is not None
    why = why_untrained(ctx.manifest.metrics("ACTOR")) if is_ours and not keys.allow_untrained_actor else None
    if why:
        raise NotTrainedError(
            f"RL does not start: {why}. Raise actor_config.lr or epochs, look at the rows (chatrlhf data show), or set "
            "guards_config.allow_untrained_actor to True"
        )
    if stage == "REWARD" or ctx.reward is not None or not keys.stop_at_coin_flip:
        return
    is_ours = ctx.trained("REWARD", "reward", config.reward_config.model) is not None
    why = why_a_coin(ctx.manifest.metrics("REWARD")) if is_ours else None
    if why:
        raise NotTrainedError(
            f"RL does not start: {why}. Give it more rows or epochs, or set guards_config.stop_at_coin_flip to False"
        )


def why_untrained(metrics: Mapping[str, float]) -> str | None:
    """In which way an actor's held-out loss says that it has learned nothing; None: it has, or nothing is held out.

    Args:
        metrics: of the finished stage; losses in nats a token.
    """
    if not {"loss/eval", "loss/eval_start", "loss/chance"} <= metrics.keys():
        return None
    start, end, chance = (metrics[name] for name in ("loss/eval_start", "loss/eval", "loss/chance"))
    fell = (start - end) / start if start > 0 else 0.0
    if end >= AT_CHANCE * chance:
        return f"the actor's held-out loss of {end:.3f} nats a token is that of guessing (ln of V: {chance:.3f})"
    if fell < NOTHING or (fell < LITTLE and end > STILL_HIGH * chance):
        moved = f"fell by {fell:.1%}" if fell >= 0 else f"rose by {-fell:.1%}"
        return f"the actor has learned nothing: its held-out loss {moved}, from {start:.3f} to {end:.3f} nats a token"
    return None


def why_a_coin(metrics: Mapping[str, float]) -> str | None:
    """In which way a reward model's held-out judgments say that it is no better than a coin; None: it is better."""
    if "reward/accuracy_low" not in metrics or metrics["reward/accuracy_low"] > 0.5:
        return None
    right, rows = metrics["reward/accuracy"], metrics["reward/held_out_rows"]
    interval = f"95 % interval {metrics['reward/accuracy_low']:.1%} to {metrics['reward/accuracy_high']:.1%}"
    return f"the reward model orders {right:.1%} of {rows:.0f} held-out rows rightly ({interval}), which a coin may do"
