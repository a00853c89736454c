"""`chatrlhf check CONFIG [--deep] [--json]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from chatrlhf.errors.boundary import USER_ERROR

STAGES = ("ALL", "PRETRAIN", "ACTOR", "REWARD", "RL")  # as in `config/schema.py`, which is not quick to import


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status, 2 where something failed."""
    options = _parser().parse_args(words)
    from rich.console import Console

    from chatrlhf.runtime.run_log import quiet_libraries
    from chatrlhf.tools.check.report import as_json, show, summary
    from chatrlhf.tools.check.run_checks import run_checks

    quiet_libraries()
    console = Console(highlight=False, quiet=options.json)
    results = []
    with console.status("configuration") as status:
        for result in run_checks(options.config, options.set, options.type, options.deep, status.update):
            results.append(result)
            show(console, result)
    console.print(summary(results))
    if options.json:
        print(json.dumps(as_json(results), indent=2, ensure_ascii=False))
    return USER_ERROR if any(result.status == "fail" for result in results) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chatrlhf check", description="Measure what could go wrong in a run, before it is paid for."
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("-t", "--type", default="ALL", choices=STAGES, help="what is to be run (%(default)s)")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key, such as actor_config.lr=1e-5"
    )
    parser.add_argument("--deep", action="store_true", help="also train on a few rows: minutes, and a stage's memory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
