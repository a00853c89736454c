"""chatrlhf: supervised actor, reward model and PPO with KL control, behind one driver.

from chatrlhf import load_config, run
result = run(load_config("config.yaml"), type="ALL")
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# A training run talks to no one the user did not name.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Forked workers of the fast tokenizers buy nothing here and warn.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# How long a thread of PyTorch's (libgomp's, which reads this once) turns round while it waits for its next operation.
# Its own 300,000 rounds are milliseconds, on a core that somebody else could use by then (`cpu_parallel.py`).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
__all__ = ["__version__", "load_config", "load_reward_model", "run"]

if TYPE_CHECKING:
    from chatrlhf.config import load_config
    from chatrlhf.models.reward_model import load_reward_model
    from chatrlhf.pipeline import run

_HOMES = {
    "load_config": "chatrlhf.config",
    "load_reward_model": "chatrlhf.models.reward_model",
    "run": "chatrlhf.pipeline",
}


def __getattr__(name: str) -> Any:
    """Imported when first used, so that ``--help`` answers without torch."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
