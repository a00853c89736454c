"""`chatrlhf plan --compare A,B,C --gpu 24GB`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from chatrlhf.errors import ConfigError, UserError


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status. Raises UserError."""
    options = _parser().parse_args(words)
    from chatrlhf.runtime.run_log import quiet_libraries
    from chatrlhf.tools.plan.hardware import DEVICES, GB, hardware
    from chatrlhf.tools.plan.published_shapes import shape_names

    if options.models:
        print("\n".join(shape_names()))
        return 0
    if options.devices:
        for device in DEVICES.values():
            print(f"{device.name}: {device.memory / GB:.0f} GB, {device.peak / 1e12:.0f} TFLOP/s in 16 bit")
        return 0
    quiet_libraries()
    if not options.compare:
        raise ConfigError("plan: nothing to compare; give --compare with names of models (--models lists them)")
    _compare([name for name in options.compare.split(",") if name], hardware(options.gpu), options)
    return 0


def _compare(names: list[str], where: object, options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from chatrlhf.tools.plan.compare import WAYS, cell, compare
    from chatrlhf.tools.plan.zero_memory import Sharding

    sharding = None
    if options.zero is not None:
        ranks = max(where.count, 1)
        sharding = Sharding("deepspeed", ranks, options.zero, options.offload, False, low=where.device.bf16)
    table = Table(title=f"on {where.name}, rows of {options.tokens} tokens", title_justify="left")
    table.add_column("model")
    table.add_column("parameters", justify="right")
    for way in WAYS:
        table.add_column(way.name)
    for name in names:
        cells, parameters = [], 0
        for way in WAYS:
            try:
                (found,) = compare([name], where, options.tokens, sharding, [way])
            except UserError as error:
                if not cells:
                    raise
                cells.append(str(error).split(": ", 1)[-1])
                continue
            cells.append(cell(found))
            parameters = parameters or found.parameters
        table.add_row(name, f"{parameters:,}", *cells)
    Console(width=max(Console().width, 150)).print(table)
    print(
        "GB a device needs with one row in a backward, and how many rows fit then. Activations are computed again; PPO "
        "has a value head on the policy and a reward model of its size, under adapters on the same weights."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chatrlhf plan", description="Which models can be trained on which hardware.")
    parser.add_argument("--compare", metavar="A,B,C", help="hub ids, folders, or names that --models lists")
    parser.add_argument("--gpu", metavar="NAME", default="24GB", help="24GB, RTX4090, 4xA100-80GB, ... (%(default)s)")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="of a row (%(default)s)")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), help="DeepSpeed's ZeRO, by its stage")
    parser.add_argument("--offload", action="store_true", help="with --zero: the optimizer in the CPU's memory")
    parser.add_argument("--models", action="store_true", help="list the models whose dimensions are in the package")
    parser.add_argument("--devices", action="store_true", help="list the devices that --gpu knows by name")
    return parser
