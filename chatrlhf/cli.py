"""The command line. It imports nothing heavy before it knows that there is work to do."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from chatrlhf import __version__
from chatrlhf.errors import ConfigError, Interrupted, UserError
from chatrlhf.errors.boundary import OUR_FAULT, STOPPED, USER_ERROR, doing, line_of, show_fault
from chatrlhf.runtime.signals import listening
from chatrlhf.tools.arguments import duration, whole_number

STAGES = ("ALL", "PRETRAIN", "ACTOR", "REWARD", "RL")  # as in `config/schema.py`, which is not quick to import

DESCRIPTION = """Train an assistant with RLHF: PRETRAIN (language modeling on long plain text), ACTOR (supervised
fine-tuning), REWARD (a model that scores completions), RL (PPO with KL control), or ALL of them (PRETRAIN where
pretrain_config names data)."""
EPILOG = """`chatrlhf init DIR` copies scripts, configurations, templates and sample data into DIR;
`chatrlhf check CONFIG` measures what could go wrong in a run, before it is paid for;
`chatrlhf data stats|check|show FILE` looks into a file of rows;
`chatrlhf eval perplexity TEXT` compares models over contexts of several lengths;
`chatrlhf export merge|delta|apply-delta|quantize|push` does what is done with finished weights;
`chatrlhf plan --compare A,B,C --gpu 24GB` says which models can be trained on which hardware;
`chatrlhf reproduce RUN` makes a run again beside it, and compares."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 where the user can mend it, 1 for a fault of this package."""
    with listening(ends_process=argv is None):
        return _status(list(sys.argv[1:] if argv is None else argv))


def _status(words: Sequence[str]) -> int:
    try:
        with doing(" ".join(["chatrlhf", *words[:1]])):
            return _run(words)
    except UserError as error:
        if _speaks():  # else another process says the same, and has written the traceback
            _say(f"error: {line_of(error)}")
        return USER_ERROR
    except Interrupted as stopped:
        if _speaks():
            _say(str(stopped.or_else("start it again")))
        return stopped.exit_status
    except KeyboardInterrupt:
        if _speaks():
            _say("stopped at once; --resume continues from the newest checkpoint")
        return STOPPED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains while it exits
        return 128 + signal.SIGPIPE
    except Exception:
        if _speaks():  # else another process failed and said why; this one lost touch with it
            show_fault()
        return OUR_FAULT


def _run(words: Sequence[str]) -> int:
    if words[:1] == ["init"]:
        return _init(words[1:])
    if words[:1] == ["check"]:
        from chatrlhf.tools.check.cli import main as check

        return check(words[1:])
    if words[:1] == ["data"]:
        from chatrlhf.tools.inspect.cli import main as data

        return data(words[1:])
    if words[:1] == ["eval"]:
        from chatrlhf.tools.evaluate.cli import main as evaluate

        return evaluate(words[1:])
    if words[:1] == ["export"]:
        from chatrlhf.tools.export.cli import main as export

        return export(words[1:])
    if words[:1] == ["plan"]:
        from chatrlhf.tools.plan.cli import main as plan

        return plan(words[1:])
    if words[:1] == ["reproduce"]:
        from chatrlhf.tools.reproduce.cli import main as reproduce

        return reproduce(words[1:])
    return _train(words)


def _speaks() -> bool:
    """Whether it is for this process to say why the run ends; without torch there is only one."""
    if "torch" not in sys.modules:
        return True
    from chatrlhf.runtime.collectives import claims_failure_report

    return claims_failure_report()


def _say(line: str) -> None:
    with suppress(OSError):  # standard error may be closed, too
        print(line, file=sys.stderr, flush=True)


def _train(words: Sequence[str]) -> int:
    args = _parser().parse_args(words)
    if args.restarts:
        return _supervise(words, args)
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    from chatrlhf.config import load_config
    from chatrlhf.runtime import collectives

    collectives.start()  # first of all, so that whatever goes wrong is said once
    config = load_config(args.config, _overrides(args))
    if args.dry_run:
        from chatrlhf.tools.plan.data_counts import parse_assumed
        from chatrlhf.tools.plan.hardware import hardware
        from chatrlhf.tools.plan.report import show_plan

        if collectives.is_main():
            where = hardware(args.gpu) if args.gpu else None
            show_plan(config, args.type, where, parse_assumed(args.rows, args.tokens))
        collectives.end()
        return 0
    from chatrlhf.pipeline import run

    result = run(config, type=args.type, resume=args.resume, time_limit=args.time_limit)
    if collectives.is_main():
        for stage, left in result.stages.items():
            print(f"{stage}: {left.checkpoint}")
        print(f"metrics: {result.output_dir / 'metrics.jsonl'}")
    collectives.end()
    return 0


def _overrides(args: argparse.Namespace) -> list[str]:
    """What the command line says in place of the file."""
    named = (
        ("actor_config.model", args.actor),
        ("reward_config.model", args.reward),
        ("output_dir", args.output_dir),
    )
    return [*args.set, *(f"{key}={_yaml_text(value)}" for key, value in named if value is not None)]


def _supervise(words: Sequence[str], args: argparse.Namespace) -> int:
    """Train in a process of its own, which is started again after a crash."""
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "--restarts: a launcher starts the processes of this run; use its own (torchrun --max-restarts)"
        )
    from chatrlhf.config import load_config
    from chatrlhf.runtime.manifest import FILE_NAME
    from chatrlhf.runtime.restarts import supervise

    def command(resume: bool, seconds_left: float | None) -> list[str]:
        limit = [] if seconds_left is None else ["--time-limit", f"{seconds_left:.0f}s"]
        # Of an option given twice the last counts.
        return ["-m", "chatrlhf", *words, "--restarts", "0", *limit, *(["--resume"] if resume else [])]

    record = load_config(args.config, _overrides(args)).run_dir / FILE_NAME
    return supervise(command, record, args.restarts, args.time_limit, _say)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chatrlhf", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("-t", "--type", default="ALL", choices=STAGES, help="default: ALL")
    parser.add_argument("-a", "--actor", metavar="MODEL", help="in place of actor_config.model")
    parser.add_argument("-r", "--reward", metavar="MODEL", help="in place of reward_config.model")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key, such as trainer_config.lam=0.9"
    )
    parser.add_argument("--output-dir", metavar="DIR", help="in place of output_dir and of each model_folder")
    parser.add_argument("--resume", action="store_true", help="go on from the newest valid checkpoints")
    parser.add_argument(
        "--time-limit", metavar="TIME", type=duration, help="stop by itself within it: 3h50m, 90s, 1d, or hh:mm:ss"
    )
    parser.add_argument(
        "--restarts", metavar="N", type=whole_number(0), default=0, help="after a crash, go on up to N times"
    )
    parser.add_argument("--dry-run", action="store_true", help="print configuration and plan, train nothing")
    plan = parser.add_argument_group("of --dry-run")
    plan.add_argument("--gpu", metavar="NAME", help="such as 24GB, RTX4090 or 4xA100-80GB; default: this machine")
    plan.add_argument(
        "--rows", metavar="STAGE=N", action="append", default=[], help="rows of an epoch, where the data are not here"
    )
    plan.add_argument(
        "--tokens", metavar="STAGE=N", action="append", default=[], help="tokens of a row, on average, likewise"
    )
    parser.add_argument("--local_rank", type=int, metavar="N", help="set by launchers")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _init(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="chatrlhf init", description="Copy the artifacts into a folder.")
    parser.add_argument("folder")
    folder = parser.parse_args(words).folder
    from chatrlhf.runtime.bundled_files import copy_artifacts

    for path in copy_artifacts(folder):
        print(path)
    return 0


def _yaml_text(value: str) -> str:
    """A command-line word as YAML text, whatever it looks like."""
    return "'" + value.replace("'", "''") + "'"
