"""What a person may talk about with an assistant, where no one has said."""

from __future__ import annotations

from pathlib import Path

from chatrlhf.errors import DataError

TOPICS = (
    "cooking with what is in the house", "baking bread", "a diet for somebody with an allergy", "growing vegetables",
    "looking after a pet", "repairing a bicycle", "a noise in the car", "fixing a dripping tap", "painting a room",
    "moving house", "saving on heating", "sorting waste", "a quarrel with a neighbor", "a present for a relative",
    "planning a wedding", "a birthday for children", "raising a teenager", "caring for old parents",
    "planning a journey by train", "packing for a hike", "what to see in a foreign city", "a delayed flight",
    "learning a language", "spelling and grammar", "a poem for an occasion", "a short story", "a speech",
    "improving a letter", "an application for a job", "a job interview", "asking for a rise", "a difficult colleague",
    "planning a project", "running a meeting", "starting a small business", "bookkeeping", "taxes in plain words",
    "a monthly budget", "saving for old age", "a contract with small print", "renting a flat", "returning goods",
    "mathematics at school", "probability", "physics in everyday life", "chemistry at school", "biology of the body",
    "astronomy", "weather and climate", "geology", "a period of history", "a historical person", "geography",
    "philosophy", "religion and customs", "art and painters", "music theory", "learning an instrument", "a novel",
    "films", "a board game", "a sport's rules", "training for a run", "stretching and posture", "sleeping better",
    "dealing with stress", "first aid", "what a doctor meant", "programming in Python", "a program that does not run",
    "SQL and databases", "a spreadsheet's formulas", "regular expressions", "how computers work", "security at home",
    "choosing a telephone", "photography", "statistics at work", "machine learning", "summing up a text",
    "comparing two products", "making a decision", "a riddle", "a misunderstanding that has to be cleared up",
)  # fmt: skip
MANNERS = (
    "is in a hurry", "is curious and wants reasons", "knows little about it", "knows the subject well",
    "wants steps to follow", "wants an example", "doubts what they have heard", "is a little upset", "is friendly",
    "writes in short sentences", "tells something about their situation first", "has tried something that did not work",
)  # fmt: skip


def read_topics(path: Path | None) -> tuple[str, ...]:
    """The topics of a file, one a line, or the ones above. Raises DataError where there are none."""
    if path is None:
        return TOPICS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the topics cannot be read ({error}); give a text file with one a line") from None
    topics = tuple(line.strip() for line in lines if line.strip())
    if not topics:
        raise DataError(f"{path}: it holds no topics; write one a line")
    return topics
