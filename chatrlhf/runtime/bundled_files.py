"""`chatrlhf init`: the scripts, configurations, templates and sample data, copied for those who installed a package."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from chatrlhf.errors import UserError
from chatrlhf.runtime.links import leads_out
from chatrlhf.runtime.publication import Publication

TOP_LEVEL = ("main.py", "config.yaml", "ds_config.json", "templates.json", "artifacts")


def artifacts_root() -> Path:
    """Where they lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    bundled = package / "_bundle"
    return bundled if bundled.exists() else package.parent


def copy_artifacts(folder: str | Path) -> list[Path]:
    """Copy them into ``folder``; returns the files written.

    Raises:
        UserError: a file is there already, or a link leads out of the folder; nothing is copied then.
    """
    target, root = Path(folder), artifacts_root()
    sources = [path for name in TOP_LEVEL for path in _files(root / name)]
    wanted = {source: target / source.relative_to(root) for source in sources}
    if links := [path for path in wanted.values() if leads_out(path.parent, target)]:
        raise UserError(f"{links[0].parent} is a link out of {target}; name a new folder")
    with Publication(target, "init", "folder") as publication:
        if there := publication.in_the_way(wanted.values()):
            raise UserError(f"{there[0]} is there already ({len(there)} files in all); name a new folder")
        publication.publish({copy: partial(shutil.copy2, source) for source, copy in wanted.items()})
    return list(wanted.values())


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
