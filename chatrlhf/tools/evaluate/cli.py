"""`chatrlhf eval perplexity TEXT --models DIR ...`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chatrlhf.errors import ConfigError
from chatrlhf.errors.boundary import doing
from chatrlhf.tools.arguments import whole_number

if TYPE_CHECKING:  # with torch behind it: what is asked for help needs none
    from rich.console import Console

    from chatrlhf.tools.evaluate.perplexity import PerplexityCurve

DEFAULT_CONTEXTS = (64, 128, 256, 512, 1024, 2048)


def main(words: Sequence[str]) -> int:
    """Run a command; returns the exit status. Raises UserError."""
    options = _parser().parse_args(words)
    if min(options.contexts) <= options.stride:
        raise ConfigError(
            f"--contexts: {min(options.contexts)} has to be more than --stride ({options.stride}), whose tokens are "
            "predicted in each window"
        )
    from rich.console import Console

    from chatrlhf.runtime.run_log import quiet_libraries
    from chatrlhf.tools.evaluate.report import show_curves

    quiet_libraries()
    console = Console(highlight=False, soft_wrap=True)
    curves, targets = _curves(options, console)
    show_curves(console, curves, f"perplexity of {options.text.name}")
    console.print(
        f"the same {targets:,} tokens in every row, each predicted from at most context - 1 and at least context - "
        f"{options.stride} tokens; * beyond the positions of the model's configuration, - it has none there",
        markup=False,
    )
    if options.json is not None:
        rows = [{"name": each.name, "positions": each.positions, "perplexity": each.perplexity} for each in curves]
        about = {"text": str(options.text), "stride": options.stride, "targets": targets, "models": rows}
        with doing("--json: writing", options.json):
            options.json.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    if options.picture is not None:
        from chatrlhf.tools.evaluate.report import save_curves

        with doing("--picture: writing", options.picture, untrusted=True):
            save_curves(curves, options.picture)
    return 0


def _curves(options: argparse.Namespace, console: Console) -> tuple[list[PerplexityCurve], int]:
    import torch
    from pydantic import ValidationError

    from chatrlhf.config.load import explain
    from chatrlhf.config.schema import ActorConfig
    from chatrlhf.data.files import read_rows
    from chatrlhf.models.for_stages import load_actor
    from chatrlhf.models.loading.backbone import is_encoder_decoder
    from chatrlhf.models.loading.rope_mismatch import scaling_warning
    from chatrlhf.models.loading.tokenizer import same_tokenizer
    from chatrlhf.runtime.device import pick_device
    from chatrlhf.tools.evaluate.perplexity import perplexity_curve, window_ends

    text = "\n\n".join(row.text("text") for row in read_rows(options.text))
    curves, first, ids, ends = [], None, None, []
    for spec in options.models:
        name, scaling = _scaled(spec)
        try:
            settings = ActorConfig(model=name, rope_scaling=scaling)
        except ValidationError as error:
            raise ConfigError(f"--models: {spec!r}: {explain(error, ActorConfig)}; write DIR@linear:8") from None
        if (warning := scaling_warning(name, settings.rope_scaling)) is not None:
            console.print(f"warning: {warning}", markup=False)
        model, tokenizer = load_actor(settings, [], pick_device())
        if is_encoder_decoder(model.config):
            raise ConfigError(f"--models: {name} is an encoder-decoder, which predicts replies and not the next token")
        if first is None:
            first = tokenizer
            ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
            ends = window_ends(len(ids), max(options.contexts), options.stride, options.windows)
        elif not same_tokenizer(first, tokenizer):
            raise ConfigError(
                f"--models: {name} has another tokenizer than {options.models[0]}; perplexities of different tokens "
                "cannot be compared"
            )
        with console.status(f"{spec}"):
            curves.append(perplexity_curve(model, ids, sorted(options.contexts), options.stride, ends, spec))
    return curves, len(ends) * options.stride


def _scaled(spec: str) -> tuple[str, dict[str, str] | None]:
    """``DIR``, or ``DIR@linear:8`` for a model whose positions are to be stretched as it is read."""
    name, separator, scaling = spec.rpartition("@")
    if not separator:
        return spec, None
    kind, _, factor = scaling.partition(":")
    return name, {"type": kind, "factor": factor}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chatrlhf eval", description="What a model can do.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    curve = commands.add_parser("perplexity", help="how well models predict a text from contexts of several lengths")
    add = curve.add_argument
    add("text", type=Path, help="a text file, or rows with a field 'text'")
    add("--models", nargs="+", required=True, metavar="DIR", help="side by side; DIR@linear:8 stretches positions")
    add("--contexts", type=_numbers, default=DEFAULT_CONTEXTS, metavar="N,N,...", help="tokens (64,128,...,2048)")
    add(
        "--stride",
        type=whole_number(1),
        default=32,
        metavar="N",
        help="tokens that are predicted in a window (%(default)s)",
    )
    add("--windows", type=whole_number(1), default=64, metavar="N", help="at most (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--picture", type=Path, metavar="FILE", help="draw them there, such as ladder.png")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 64,128,256") from None
