"""The datasets by the names that users give."""

from __future__ import annotations

from chatrlhf.data.sources import (
    Source,
    airoboros,
    alpaca,
    dolphin,
    fanfics,
    gpt4all,
    hh_rlhf,
    oasst1,
    orca_chat,
    pile,
    red_pajama,
    self_instruct,
    shp,
    soda,
)

SOURCES: dict[str, Source] = {
    "ARLHF": hh_rlhf.SOURCE,
    "SHP": shp.SOURCE,
    "OASST1": oasst1.SOURCE,
    "SODA": soda.SOURCE,
    "ALPACA": alpaca.SOURCE,
    "SELF_INSTRUCT": self_instruct.SOURCE,
    "GPT4ALL": gpt4all.SOURCE,
    "ORCA_CHAT": orca_chat.SOURCE,
    "DOLPHIN": dolphin.SOURCE,
    "AIROBOROS": airoboros.SOURCE,
    "RED_PAJAMA": red_pajama.SOURCE,
    "PILE": pile.SOURCE,
    "FANFICS": fanfics.SOURCE,
}


def listing() -> list[str]:
    """A table of the datasets, a line each."""
    rows = [("name", "dataset", "size", "licence")]
    rows += [(name, source.hub_name, source.size, source.licence) for name, source in SOURCES.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
