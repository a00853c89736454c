"""Folders that runs have published are verified when they are read: every file has the hash it was published with.

A folder lists its files in ``contents.json``, and the manifest of its run has that list's hash. A folder with neither,
as of the hub, is read as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from chatrlhf.errors import WeightsError
from chatrlhf.runtime.atomic_files import CONTENTS, why_invalid
from chatrlhf.runtime.file_hash import sha256_of

RECORD = "manifest.json"  # beside a run's folders; its stages have `RECORDED`
RECORDED = "contents"  # of a stage's record: by folder, the SHA-256 of its list


def listing_hashes(run_dir: Path, folders: Iterable[str]) -> dict[str, str]:
    """What a stage's record says of the folders that it has left."""
    lists = {name: run_dir / name / CONTENTS for name in folders}
    return {name: sha256_of(path) for name, path in lists.items() if path.exists()}


def require_whole(folder: str | Path) -> None:
    """Refuse a published folder that is not what it was. Each file is read once in a process.

    Raises:
        WeightsError: it names the file.
    """
    place = Path(folder)
    if not place.is_dir():
        return
    recorded, listing = _recorded(place), place / CONTENTS
    if recorded is None and not listing.exists():
        return
    found = sha256_of(listing) if listing.is_file() else ""
    if recorded is not None and found != recorded:
        why = f"{CONTENTS} is " + ("not the one that was written with it" if found else "missing")
    else:
        why = why_invalid(place)
    if why:
        raise WeightsError(
            f"{folder}: {why}, so this is not what its run has left. Restore it from a copy or train it again; if you "
            f"have changed it on purpose, copy the folder without {CONTENTS} and name the copy"
        )


def _recorded(place: Path) -> str | None:
    """The hash of a folder's list in the manifest beside it; None where there is none."""
    try:
        stages = json.loads((place.parent / RECORD).read_text(encoding="utf-8"))["stages"].values()
        return next((stage[RECORDED][place.name] for stage in stages if place.name in stage.get(RECORDED, {})), None)
    except (OSError, ValueError, RecursionError, LookupError, AttributeError, TypeError):  # whoever needs it says so
        return None
