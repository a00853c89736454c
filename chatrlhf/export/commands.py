"""`chatrlhf export merge|delta|apply-delta`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(words: Sequence[str]) -> int:
    """Run a command; returns the exit status. Raises UserError."""
    options = _parser().parse_args(words)
    from chatrlhf.progress import quiet_libraries

    quiet_libraries()
    if options.command == "merge":
        import torch

        from chatrlhf.export.merge import merge

        compared = merge(options.model, options.output, getattr(torch, options.dtype))
        print(
            f"wrote {options.output}: its logits differ from those of base and adapters by {compared.difference:.3g} "
            f"(root mean square; their own deviation is {compared.spread:.3g})"
        )
    elif options.command == "delta":
        from chatrlhf.export.delta import make_delta

        about = make_delta(options.base, options.target, options.output)
        print(f"wrote {options.output}: {len(about['tensors']):,} tensors, base SHA-256 {about['base_sha256'][:12]}...")
    else:
        from chatrlhf.export.delta import apply_delta

        apply_delta(options.base, options.delta, options.output, lambda line: print(f"warning: {line}"))
        print(f"wrote {options.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chatrlhf export", description="What is done with finished weights.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    merge = commands.add_parser("merge", help="adapters into the weights they belong to")
    merge.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of the adapters")
    merge.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="(%(default)s)")
    delta = commands.add_parser("delta", help="a model as the difference to its base")
    delta.add_argument("--target", type=Path, required=True, metavar="DIR", help="the model, in whole weights")
    apply = commands.add_parser("apply-delta", help="a model of its base and such a difference")
    apply.add_argument("--delta", type=Path, required=True, metavar="DIR", help="what `export delta` wrote")
    for each in (delta, apply):
        each.add_argument("--base", type=Path, required=True, metavar="DIR", help="the base, in whole weights")
    for each in (merge, delta, apply):
        each.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    return parser
