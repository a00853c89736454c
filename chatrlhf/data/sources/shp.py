"""stanfordnlp/SHP: a post and two comments a row, one of which its readers preferred.

The card's advice is followed: a long post is shortened, a comment never; few pairs are taken of one post.
"""

from __future__ import annotations

from chatrlhf.conversation import Conversation, Pair, Prompt, Provenance
from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import EMPTY_REPLY, Converted, Source

POST_CHARS = 2000  # of a post are kept, roughly 500 tokens: its beginning, where the question stands
PAIRS_PER_POST = 5


def records(row: Row) -> Converted:
    """A pair. Raises DataError for a missing field or an unknown label."""
    post, a, b = (row.text(field) for field in ("history", "human_ref_A", "human_ref_B"))
    label = row.with_numbers("labels").values.get("labels")
    if isinstance(label, bool) or label not in (0, 1):
        raise row.wrong("labels", f"expected 1 (A preferred) or 0 (B preferred), got {label!r}")
    if not (a.strip() and b.strip()):
        return [EMPTY_REPLY]
    pair = Pair(a, b) if label == 1 else Pair(b, a)
    of_post = Provenance(group=row.optional_text("post_id"))
    return [Conversation(Prompt.of(shorten(post)), pair=pair, provenance=of_post)]


def shorten(post: str) -> str:
    """The beginning of a post, at most `POST_CHARS` characters, cut between words where there is a blank."""
    if len(post) <= POST_CHARS:
        return post
    # One character more, so that a word that ends exactly at the limit is kept.
    words = post[: POST_CHARS + 1].rsplit(maxsplit=1)
    return (words[0] if len(words) == 2 else post)[:POST_CHARS].rstrip()


SOURCE = Source(
    hub_name="stanfordnlp/SHP",
    licence="Reddit's terms of use",
    size="385,000 pairs",
    template="chatllama",
    convert=records,
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
    pairs_per_prompt=PAIRS_PER_POST,
)
