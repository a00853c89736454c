"""The table at the end of a run: the fine-tuned actor and the RL actor on the same held-out prompts."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chatrlhf.rl.held_out import HeldOutReport
from chatrlhf.rl.verdict import FEWEST_PROMPTS

SHOWN_PROMPTS = 3


def gap_closed(before: HeldOutReport, after: HeldOutReport, best: float) -> float | None:
    """Share of the distance between the first true score and the best possible one that the second has made."""
    if before.true_score is None or after.true_score is None or before.true_score >= best:
        return None
    return (after.true_score - before.true_score) / (best - before.true_score)


def show_comparison(console: Console, before: HeldOutReport, after: HeldOutReport, best: float | None) -> None:
    """Print the comparison, each criterion before and after, and some completions side by side."""
    table = Table(title=f"{len(before.prompts)} held-out prompts, one sample each", title_justify="left")
    table.add_column("")
    for name in ("SFT actor", "RL actor", "change"):
        table.add_column(name, justify="right")

    def row(name: str, first: float, second: float, digits: int = 2) -> None:
        table.add_row(name, f"{first:.{digits}f}", f"{second:.{digits}f}", f"{second - first:+.{digits}f}")

    if before.true_score is not None and after.true_score is not None:
        row("true score" + (f" (best {best:g})" if best is not None else ""), before.true_score, after.true_score)
        for name, values in before.criteria.items():
            row(f"  {name}", _mean(values), _mean(after.criteria[name]))
    row("learned reward", before.reward, after.reward)
    row("  its deviation", before.reward_std, after.reward_std)
    row("KL to the SFT actor (nats, k3)", before.kl, after.kl)
    row("length (tokens)", before.length, after.length, 1)
    row("finished", before.finished, after.finished)
    row("distinct completions", before.distinct, after.distinct)
    if before.demonstration_loss is not None and after.demonstration_loss is not None:
        row("loss on held-out demonstrations", before.demonstration_loss, after.demonstration_loss)
    console.print(table)
    closed = gap_closed(before, after, best) if best is not None else None
    if closed is not None:
        console.print(
            f"RL closed {closed:.2f} of the distance between the SFT actor's true score and the best possible."
        )
    if before.reward_std > 0 and len(before.prompts) >= FEWEST_PROMPTS:
        rise = (after.reward - before.reward) / before.reward_std
        console.print(f"RL moved the learned reward by {rise:+.2f} standard deviations of the SFT actor's.")
    samples = Table(title="side by side", title_justify="left", show_lines=True)
    for name in ("prompt", "SFT actor", "RL actor"):
        samples.add_column(name, overflow="fold")
    for i in range(min(SHOWN_PROMPTS, len(before.prompts))):
        cells = (before.prompts[i], before.completions[i], after.completions[i])
        samples.add_row(*(escape(_shortened(cell)) for cell in cells))
    console.print(samples)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _shortened(text: str, limit: int = 300) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[: limit - 3] + "..."
