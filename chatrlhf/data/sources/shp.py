"""stanfordnlp/SHP: a post and two comments a row, one of which its readers preferred.

The card's advice is followed: a long post is shortened, a comment never; few pairs are taken of one post.
"""

from __future__ import annotations

from chatrlhf.data.records import Preference
from chatrlhf.data.sources import Row, Source, text_field
from chatrlhf.errors import DataError

POST_CHARS = 2000  # of a post are kept, roughly 500 tokens: its beginning, where the question stands
PAIRS_PER_POST = 5


def to_preference(row: Row, place: str) -> Preference | str:
    """A pair, or why the row is left out. Raises DataError for a missing field or an unknown label."""
    post, a, b = (text_field(row, field, place) for field in ("history", "human_ref_A", "human_ref_B"))
    label = row.get("labels")
    if isinstance(label, bool) or label not in (0, 1):
        raise DataError(f"{place}, field 'labels': expected 1 (A preferred) or 0 (B preferred), got {label!r}")
    if not (a.strip() and b.strip()):
        return "empty replies"
    chosen, rejected = (a, b) if label == 1 else (b, a)
    return Preference(shorten(post), chosen, rejected)


def shorten(post: str) -> str:
    """The beginning of a post, at most `POST_CHARS` characters, cut between words where there is a blank."""
    if len(post) <= POST_CHARS:
        return post
    # One character more, so that a word that ends exactly at the limit is kept.
    words = post[: POST_CHARS + 1].rsplit(maxsplit=1)
    return (words[0] if len(words) == 2 else post)[:POST_CHARS].rstrip()


SOURCE = Source(
    hub_name="stanfordnlp/SHP",
    subsets=(
        "askacademia",
        "askanthropology",
        "askbaking",
        "askcarguys",
        "askculinary",
        "askdocs",
        "askengineers",
        "askhistorians",
        "askhr",
        "askphilosophy",
        "askphysics",
        "askscience",
        "asksciencefiction",
        "asksocialscience",
        "askvet",
        "changemyview",
        "explainlikeimfive",
        "legaladvice",
    ),
    splits=("train", "validation", "test"),
    suffix=".json",
    template="chatllama",
    pairs_per_prompt=PAIRS_PER_POST,
    convert=to_preference,
)
