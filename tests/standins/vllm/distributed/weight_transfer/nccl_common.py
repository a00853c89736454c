"""The trainer's end of the group that weights are sent through; here a queue in memory instead of NCCL."""

import queue
from types import SimpleNamespace

opened: list[SimpleNamespace] = []


def trainer_init(init_info: dict) -> SimpleNamespace:
    group = SimpleNamespace(sent=queue.Queue(), group=SimpleNamespace(store=None, socket=None), init_info=init_info)
    opened.append(group)
    return group
