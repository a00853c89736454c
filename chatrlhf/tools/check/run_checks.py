"""All checks of a configuration, one after the other; what one has refused is not told again by the next."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from chatrlhf.config import load_config
from chatrlhf.errors import UserError
from chatrlhf.errors.boundary import doing
from chatrlhf.runtime.check_result import CheckResult, failed
from chatrlhf.tools.check.models import check_actor, check_reward_model
from chatrlhf.tools.check.policy import check_policy
from chatrlhf.tools.check.resources import check_plan
from chatrlhf.tools.check.reward_function import check_reward_function
from chatrlhf.tools.check.session import Session
from chatrlhf.tools.check.start import check_folder, check_inputs, check_keys, check_texts

CONFIGURATION = "configuration"


class Group(NamedTuple):
    """Checks that belong together, and the groups that they build on."""

    name: str
    checks: Callable[[Session], Iterator[CheckResult]]
    needs: tuple[str, ...] = ()
    loads: bool = False  # models, whose memory the next group needs


DATA, KEYS = "data", CONFIGURATION
GROUPS = (
    Group("output folder", check_folder),
    Group(DATA, check_inputs),
    Group(KEYS, check_keys),
    Group("rows", check_texts, (DATA, KEYS)),
    Group("reward function", check_reward_function, (DATA, KEYS)),
    Group("plan", check_plan, (DATA, KEYS)),
    Group("actor", check_actor, (DATA, KEYS), loads=True),
    Group("reward model", check_reward_model, (DATA, KEYS), loads=True),
    Group("RL", check_policy, (DATA, KEYS, "actor", "reward model"), loads=True),
)


def run_checks(
    path: str, overrides: Sequence[str], type: str, deep: bool, doing_now: Callable[[str], None] = lambda _: None
) -> Iterator[CheckResult]:
    """Every check of a configuration file.

    Args:
        overrides: words such as ``section.key=value``.
        type: ALL or a stage.
        doing_now: is told the name of each group before it begins.
    """
    try:
        config = load_config(path, list(overrides))
    except UserError as error:
        yield failed(CONFIGURATION, error)
        return
    with tempfile.TemporaryDirectory(prefix="chatrlhf-check-") as scratch:
        session = Session(config, config.stages(type), Path(scratch), deep)
        for group in GROUPS:
            if session.failed & set(group.needs):
                continue
            doing_now(group.name)
            try:
                with doing(f"checking the {group.name}"):
                    yield from group.checks(session)
            except UserError as error:
                session.failed.add(group.name)
                yield failed(group.name, error)
            if group.loads:
                gc.collect()
                torch.cuda.empty_cache()
