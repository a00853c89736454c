"""nomic-ai/gpt4all_prompt_generations: questions, some with the markup of the page they come from."""

from __future__ import annotations

import html
import re

from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import Converted, Source, answered

MARKUP = re.compile(r"</?(?:p|pre|code)>")


def records(row: Row) -> Converted:
    """A question, without markup, and its answer."""
    prompt = row.text("prompt")
    if MARKUP.search(prompt):
        prompt = html.unescape(MARKUP.sub("", prompt)).strip()
    yield answered(prompt, row.text("response"), "gpt-3.5-turbo", row=row.optional_text("source"))


SOURCE = Source(
    hub_name="nomic-ai/gpt4all_prompt_generations",
    licence="Apache-2.0",
    size="about 400,000 questions",
    template="chatllama",
    convert=records,
)
