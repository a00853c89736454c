"""A run's folder without a run: what its manifest says."""

from __future__ import annotations

from pathlib import Path

from small_run import length

from chatrlhf.config import Config
from chatrlhf.data.inputs import read_inputs
from chatrlhf.rl.rewards import FunctionReward
from chatrlhf.runtime.manifest import OUTPUTS, Manifest
from chatrlhf.stages.sources import Sources


def claim(
    run_dir: Path, config: Config, stage: str = "ACTOR", reward: str | None = None, finish: bool = True
) -> Manifest:
    """A manifest as a run leaves it that has trained a stage; nothing is trained."""
    manifest = Manifest.open(run_dir, resume=False)
    manifest.begin(config, [stage], reward)
    judge = FunctionReward(length, "length") if stage == "RL" else None
    inputs = read_inputs(config, [stage], needs_judgements=True)
    made_from = Sources(config, manifest, inputs, judge, print).made_from(stage)
    manifest.start(stage, made_from, {})
    if finish:
        manifest.finish(stage, {"model": "tiny", "output": OUTPUTS[stage][0], "metrics": {}})
    return manifest
