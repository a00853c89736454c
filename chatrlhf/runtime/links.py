"""Links that lead out of a folder: what is copied or uploaded of a folder is what it holds."""

from __future__ import annotations

from pathlib import Path

SNAPSHOTS, BLOBS = "snapshots", "blobs"  # in the hub's cache a snapshot's files are links to the blobs beside it


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file of a folder is, or is below, a link to something outside of the folder."""
    inside, target = folder.resolve(), path.resolve()
    if target.is_relative_to(inside):
        return False
    is_snapshot = inside.parent.name == SNAPSHOTS
    return not (is_snapshot and target.is_relative_to(inside.parents[1] / BLOBS))
