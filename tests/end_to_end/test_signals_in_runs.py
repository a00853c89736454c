"""Each signal at each moment of a run: one line says how to go on, and the resumed run leaves what it always does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import differences, finish, left_behind, length, settings, start, write_config, write_files

from chatrlhf.config import load_config
from chatrlhf.errors import Interrupted
from chatrlhf.pipeline import run
from chatrlhf.runtime import fault_points, signals
from chatrlhf.runtime.signals import NUMBERS

pytestmark = pytest.mark.usefixtures("signals_arrive")


def of(name: object) -> Callable[..., bool]:
    """Whether a place's first fact is this one; of a folder its name."""
    return lambda fact=None, *_: (fact.name if isinstance(fact, Path) else fact) == name


# Where, and which call or which facts.
MOMENTS: dict[str, tuple[str, int | Callable[..., bool]]] = {
    "before the first stage": ("run.stage", of("ACTOR")),
    "in ACTOR's first step": ("trainer.step", 1),
    "in ACTOR's last step": ("trainer.step", 7),
    "while a checkpoint is published": ("trainer.publish", 3),
    "while an actor is published": ("publish.between_renames", of("actor")),
    "before REWARD": ("run.stage", of("REWARD")),
    "in REWARD's last step": ("trainer.step", 14),
    "while a reward model is written": ("reward_model.head", 1),
    "while RL judges its start": ("rollout.draw", 2),
    "in a rollout": ("rollout.draw", 40),
    "in a minibatch": ("rl.optimizer_step", 7),
    "while RL writes a checkpoint": ("rl.weights_saved", 1),
    "in RL's last step": ("rl.step", of(6)),
}
SIGNALS = {signal.Signals(number).name: (number,) for number in NUMBERS}
MIXTURES = {
    "SIGTERM and SIGINT": (signal.SIGTERM, signal.SIGINT),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
    "SIGUSR1 and SIGHUP": (signal.SIGUSR1, signal.SIGHUP),
}
EVERY = {(moment, kind): (SIGNALS | MIXTURES)[kind] for moment in MOMENTS for kind in SIGNALS | MIXTURES}
IN_CI = [
    ("in ACTOR's last step", "SIGHUP"),
    ("while a checkpoint is published", "SIGTERM and SIGINT"),
    ("in a rollout", "SIGUSR1"),
    ("while RL writes a checkpoint", "SIGQUIT"),
]


def files(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / "actor.json").exists():
        write_files(folder)
    return settings(folder) | {"output_dir": str(folder / name)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("signals")


@pytest.fixture(scope="module")
def undisturbed(folder) -> dict[str, Any]:
    result = run(load_config(files(folder, "undisturbed")))
    return left_behind(result.output_dir)


def check(folder: Path, undisturbed: dict[str, Any], moment: str, kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(signals, "SAME_REQUEST", 0.0)
    config = load_config(files(folder, f"{moment} {kind}".replace(" ", "_").replace("'", "")))
    place, which = MOMENTS[moment]
    sent: list[bool] = []

    def send(*facts: Any) -> None:
        if not sent and (isinstance(which, int) or which(*facts)):
            sent.append(True)
            for number in EVERY[moment, kind]:
                os.kill(os.getpid(), number)
                time.sleep(0)

    end = fault_points.at(place, send, which if isinstance(which, int) else None)
    try:
        with pytest.raises((Interrupted, KeyboardInterrupt)) as stopped:
            run(config)
            if moment == "in RL's last step" and sent:
                raise Interrupted(EVERY[moment, kind][0], "nothing was left to do; --resume")
    finally:
        end()
    assert sent, f"the run was never {moment}"
    if isinstance(stopped.value, Interrupted):
        assert str(stopped.value).startswith(f"stopped by {signal.Signals(stopped.value.number).name}; ")
        assert "--resume" in str(stopped.value)
    run(config, resume=True)
    assert differences(left_behind(config.run_dir), undisturbed) == []


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "kind"), IN_CI)
def test_a_signal_leaves_a_run_that_can_be_resumed(folder, undisturbed, moment, kind, monkeypatch):
    check(folder, undisturbed, moment, kind, monkeypatch)


@pytest.mark.nightly
@pytest.mark.parametrize(("moment", "kind"), [case for case in EVERY if case not in IN_CI])
def test_every_signal_at_every_moment(folder, undisturbed, moment, kind, monkeypatch):
    check(folder, undisturbed, moment, kind, monkeypatch)


def test_a_time_limit_leaves_a_checkpoint(tmp_path, monkeypatch):
    """The clock is that of the steps, a second each: the sixth would end behind the limit."""
    steps = [0]
    end = fault_points.at("rl.step", lambda step: steps.append(step))
    monkeypatch.setattr(signals.time, "monotonic", lambda: float(steps[-1]))
    config = load_config(files(tmp_path, "limited"), {"actor_config.model": "tiny"})
    try:
        with pytest.raises(
            Interrupted, match=r"stopped at the time limit; continue with --resume \(checkpoint .*000003"
        ):
            run(config, type="RL", reward_fn=length, time_limit=3.5)
    finally:
        end()
    assert steps[-1] == 3


@pytest.mark.slow
def test_whoever_read_the_output_has_gone(tmp_path):
    """As with `chatrlhf config.yaml | grep -m 1 ACTOR`."""
    write_files(tmp_path)
    config = write_config(tmp_path)
    process = start(str(config), "--output-dir", str(tmp_path / "run"))
    assert process.stdout is not None
    while not process.stdout.readline().startswith("ACTOR"):
        pass
    process.stdout.close()
    process.stdout = None
    status, _, err = finish(process)
    assert status == 128 + signal.SIGPIPE
    assert err.splitlines()[-1].startswith("stopped by SIGPIPE; ") and "--resume" in err.splitlines()[-1]
    assert "Traceback" not in err
    status, _, err = finish(start(str(config), "--output-dir", str(tmp_path / "run"), "--resume"))
    assert status == 0, err


@pytest.mark.nightly
def test_a_killed_run_is_started_again(tmp_path):
    """The first process dies in its second PPO step, as if memory had run out; the second one does the rest."""
    write_files(tmp_path)
    config = write_config(tmp_path)
    once = f"""
import os, pathlib, signal
from chatrlhf.runtime import fault_points
mark = pathlib.Path({str(tmp_path / "killed")!r})
def die(step):
    if step == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
fault_points.at("rl.step", die)
"""
    (tmp_path / "sitecustomize.py").write_text(once)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        process = start(str(config), "--output-dir", str(tmp_path / "run"), "--restarts", "2")
    status, out, err = finish(process)
    assert status == 0, err
    assert (tmp_path / "killed").exists()
    assert "the run ended by SIGKILL; restart 1 of 2 in 1 s" in err
    assert "ACTOR: finished before" in out
