"""`chatrlhf export merge|delta|apply-delta|quantize|push`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chatrlhf.errors import ConfigError
from chatrlhf.errors.boundary import doing
from chatrlhf.tools.arguments import whole_number

if TYPE_CHECKING:  # what is asked for help needs nothing behind it
    from chatrlhf.tools.export.hub import Repository

DTYPES = ("bfloat16", "float16", "float32")


def main(words: Sequence[str]) -> int:
    """Run a command; returns the exit status. Raises UserError."""
    options = _parser().parse_args(words)
    from chatrlhf.runtime.run_log import quiet_libraries

    quiet_libraries()
    repository = _repository(options)
    if repository is not None:
        repository.check()  # before anything long
    run = {"merge": _merge, "delta": _delta, "apply-delta": _apply_delta, "quantize": _quantize, "push": _push}
    folder = run[options.command](options)
    if repository is not None:
        print(f"pushed {folder} to {repository.push(folder)} ({'public' if repository.public else 'private'})")
    return 0


def _warn(line: str) -> None:
    print(f"warning: {line}")


def _merge(options: argparse.Namespace) -> Path:
    import torch

    from chatrlhf.tools.export.merge import merge

    with doing("--model: merging the adapters in", options.model, untrusted=True):
        compared = merge(options.model, options.output, getattr(torch, options.dtype), _warn)
    print(
        f"wrote {options.output}: its logits differ from those of base and adapters by {compared.difference:.3g} "
        f"(root mean square; their own deviation is {compared.spread:.3g})"
    )
    return options.output


def _delta(options: argparse.Namespace) -> Path:
    from chatrlhf.tools.export.delta import make_delta

    with doing("--target: subtracting --base from", options.target):
        about = make_delta(options.base, options.target, options.output)
    print(f"wrote {options.output}: {len(about['tensors']):,} tensors, base SHA-256 {about['base_sha256'][:12]}...")
    return options.output


def _apply_delta(options: argparse.Namespace) -> Path:
    from chatrlhf.tools.export.delta import apply_delta

    with doing("--delta: applying", options.delta):
        apply_delta(options.base, options.delta, options.output, _warn)
    print(f"wrote {options.output}")
    return options.output


def _quantize(options: argparse.Namespace) -> Path:
    import torch
    from rich.console import Console

    from chatrlhf.tools.evaluate.report import show_curves
    from chatrlhf.tools.export.quantize import Asked, quantize

    given = {name: value for name, value in vars(options).items() if name in Asked.__dataclass_fields__}
    asked = Asked(**given | {"dtype": getattr(torch, options.dtype)})
    with doing("--model: quantizing", options.model):
        found = quantize(asked, _warn)
    on = (asked.text or asked.calibration).name
    title = f"perplexity of {on}" + ("" if asked.text else ", its last tokens, which were not calibrated on")
    show_curves(Console(highlight=False, soft_wrap=True), [found.before, found.after], title)
    print(
        f"wrote {options.output}: {found.bytes_after / 1e6:,.1f} MB of weights, before {found.bytes_before / 1e6:,.1f}"
        f"; both predicted the same {found.targets:,} tokens"
    )
    return options.output


def _push(options: argparse.Namespace) -> Path:
    return options.folder


def _repository(options: argparse.Namespace) -> Repository | None:
    if options.push_to_hub is None:
        for flag in ("public", "update"):
            if getattr(options, flag):
                raise ConfigError(f"--{flag}: it goes with --push-to-hub; add that or leave it out")
        return None
    from chatrlhf.tools.export.hub import Repository

    return Repository(options.push_to_hub, options.public, options.update)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chatrlhf export", description="What is done with finished weights.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    merge = commands.add_parser("merge", help="adapters into the weights they belong to")
    merge.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of the adapters")
    merge.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(%(default)s)")
    delta = commands.add_parser("delta", help="a model as the difference to its base")
    delta.add_argument("--target", type=Path, required=True, metavar="DIR", help="the model, in whole weights")
    apply = commands.add_parser("apply-delta", help="a model of its base and such a difference")
    apply.add_argument("--delta", type=Path, required=True, metavar="DIR", help="what `export delta` wrote")
    for each in (delta, apply):
        each.add_argument("--base", type=Path, required=True, metavar="DIR", help="the base, in whole weights")
    quantize = commands.add_parser("quantize", help="a model in 4 or 8 bits")
    _add_quantize(quantize)
    for each in (merge, delta, apply, quantize):
        each.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
        each.add_argument("--push-to-hub", metavar="REPO", help="upload the result, such as me/my-model")
    push = commands.add_parser("push", help="upload the folder of a model, with a card of what its run wrote down")
    push.add_argument("folder", type=Path, metavar="FOLDER")
    push.add_argument("push_to_hub", metavar="REPO", help="such as me/my-model")
    for each in (merge, delta, apply, quantize, push):
        each.add_argument("--public", action="store_true", help="everybody may read it (else: private)")
        each.add_argument("--update", action="store_true", help="the repository may hold files already")
    return parser


def _add_quantize(quantize: argparse.ArgumentParser) -> None:
    add = quantize.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="folder of a model, in whole weights")
    add("--method", choices=("gptq", "nf4", "int8"), default="gptq", help="(%(default)s)")
    add("--calibration", type=Path, metavar="FILE", help="gptq: rows or a text, like what the model will read")
    add("--text", type=Path, metavar="FILE", help="for the perplexity (the last tenth of --calibration)")
    add(
        "--group-size",
        type=whole_number(1),
        default=128,
        metavar="N",
        help="gptq: inputs that share a scale (%(default)s)",
    )
    add("--samples", type=whole_number(1), default=128, metavar="N", help="gptq: pieces to calibrate on (%(default)s)")
    add("--length", type=whole_number(2), default=2048, metavar="N", help="gptq: tokens of a piece (%(default)s)")
    add(
        "--context",
        type=whole_number(2),
        default=512,
        metavar="N",
        help="tokens of a window for perplexity (%(default)s)",
    )
    add("--windows", type=whole_number(1), default=64, metavar="N", help="of the text, at most (%(default)s)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of what stays whole (%(default)s)")
