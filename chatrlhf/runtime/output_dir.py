"""Folder of a run: whether it can be made and written to, before anything else is done."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from chatrlhf.config.schema import Config
from chatrlhf.errors import ConfigError
from chatrlhf.runtime.manifest import FILE_NAME
from chatrlhf.runtime.run_log import METRICS, SAMPLES

FOLDERS, FILES = ("checkpoints", "previous"), (FILE_NAME, METRICS, SAMPLES)
TRIES = 100  # while other runs try the same path
MODEL_FOLDER = "actor_config.model_folder"  # ChatLLaMA's name


def key_of_folder(config: Config) -> str:
    """The key that names the run's folder."""
    return "output_dir" if config.output_dir is not None or config.actor_config.model_folder is None else MODEL_FOLDER


def check_output_dir(config: Config) -> None:
    """Make sure that the run's folder can be made and written to; what is made for that is removed again.

    Raises:
        ConfigError: it cannot, something in it is in the way, or it is the folder of a model; the key is named.
    """
    folder, key = config.run_dir, key_of_folder(config)
    try:
        _try_to_write(folder)
    except (OSError, ValueError) as error:  # ValueError: a null character
        in_the_way = [path for path in (folder, *folder.parents) if os.path.isfile(path)]
        reason = f"{in_the_way[0]} is a file" if in_the_way else getattr(error, "strerror", None) or error
        raise ConfigError(f"{key}: nothing can be written to {str(folder)!r} ({reason}); name another folder") from None
    for name in (*FOLDERS, *FILES):
        path = folder / name
        if os.path.lexists(path) and not (path.is_dir() if name in FOLDERS else path.is_file()):
            kind = "folder" if name in FOLDERS else "file"
            raise ConfigError(f"{key}: {path} is in the way, a {kind} of this name is written there; move it away")
    for section in ("actor_config", "reward_config", "critic_config"):
        model = getattr(config, section).model
        if model is not None and os.path.isdir(model) and folder.is_dir() and folder.samefile(model):
            raise ConfigError(f"{key}: {str(folder)!r} is the folder of {section}.model; name another for the results")


def _try_to_write(folder: Path) -> None:
    for _ in range(TRIES):
        with suppress(FileNotFoundError):  # another first start has made a part of the path, and removed it again
            _try_once(folder)
            return
    _try_once(folder)


def _try_once(folder: Path) -> None:
    made: list[Path] = []
    try:
        for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
            try:
                missing.mkdir()
            except FileExistsError:
                # One look, which is FileNotFoundError where another start has removed it in between.
                if not stat.S_ISDIR(missing.stat().st_mode):
                    raise
            else:
                made.append(missing)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for each in reversed(made):
            with suppress(OSError):
                each.rmdir()
