"""`chatrlhf data stats|check|show FILE`."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from chatrlhf.conversation import Conversation
from chatrlhf.data.encoder import IGNORED, Encoder
from chatrlhf.data.sources.catalogue import SOURCES
from chatrlhf.errors.boundary import doing
from chatrlhf.tools.arguments import whole_number
from chatrlhf.tools.inspect.validation import STAGES

if TYPE_CHECKING:
    from rich.console import Console

    from chatrlhf.data.encoder import Encoder

SHOWN = 5_000  # tokens of a stretch, and characters of a field
OPENING, CLOSING = "⟦", "⟧"  # around what is trained, where there is no color


def marked(ids: Sequence[int], labels: Sequence[int], encoder: Encoder, in_colour: bool) -> Text:
    """The text of a row's tokens; what has a label is underlined, or in brackets where there is no color.

    Of more than `SHOWN` tokens in a row with or without a label the middle is left out.
    """
    text = Text()
    for trained, stretch in groupby(zip(ids, labels, strict=True), key=lambda token: token[1] != IGNORED):
        shown = shortened([token for token, _ in stretch], encoder)
        if not trained:
            text.append(shown, "dim")
        elif in_colour:
            text.append(shown, "green underline")
        else:
            text.append(f"{OPENING}{shown}{CLOSING}")
    return text


def shortened(ids: list[int], encoder: Encoder) -> str:
    """The text of tokens; of more than `SHOWN`, or of endless ones, their beginning and end."""
    decode = encoder.tokenizer.decode
    if len(ids) <= SHOWN:
        text = str(decode(ids, skip_special_tokens=False))
        if len(text) <= 10 * SHOWN:
            return text
    start = decode(ids[: SHOWN // 2], skip_special_tokens=False)[:SHOWN]  # a token may be a long run of one letter
    end = decode(ids[-100:], skip_special_tokens=False)[-SHOWN:]
    return f"{start} … (the middle of {len(ids):,} tokens is not shown) … {end}"


def measure(ids: Sequence[int], labels: Sequence[int], encoder: Encoder) -> str:
    """How many tokens a row has, and how many of them are trained."""
    trained = sum(label != IGNORED for label in labels)
    over = f", beyond the context of {encoder.max_length:,}" if len(ids) > encoder.max_length else ""
    return f"{len(ids):,} tokens, {trained:,} of them trained{over}"


def quoted(text: str) -> str:
    """A field's text in quotes; of a long one its beginning, and how much is left out."""
    left_out = len(text) - SHOWN
    return repr(text) if left_out <= 0 else f"{text[:SHOWN]!r} … ({left_out:,} characters are not shown)"


# Of the tokenizer that is made where none is named: its size, and the rows and characters of each that it is made of.
TINY_VOCABULARY, TINY_ROWS, TINY_CHARACTERS = 4096, 2000, 100_000
FOUND_FAULTS = 1


def main(words: Sequence[str]) -> int:
    """Run a command; returns the exit status, 1 where `check` has found a fault."""
    options = _parser().parse_args(words)
    # Names of files and texts of rows may hold what the terminal's encoding has not; it is shown escaped.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    from rich.console import Console

    console = Console()
    return {"stats": _stats, "check": _check, "show": _show}[options.command](options, console)


def _stats(options: argparse.Namespace, console: Console) -> int:
    from chatrlhf.tools.inspect.report import save_picture, show_statistics
    from chatrlhf.tools.inspect.statistics import count, records_in

    encoder = _encoder(options, console)
    with console.status("counting"):
        statistics = count(records_in(options.file, options.dataset), encoder)
    show_statistics(console, statistics, str(options.file))
    if options.picture is not None:
        with doing("--picture: writing", options.picture, untrusted=True):
            save_picture(statistics, options.file.name, options.picture)
        console.print(f"wrote {options.picture}", highlight=False)
    return 0


def _check(options: argparse.Namespace, console: Console) -> int:
    from chatrlhf.tools.inspect.validation import faults_in

    found = 0
    for fault in faults_in(options.file, options.dataset, options.stage):
        print(fault)
        found += 1
    print(f"{options.file}: {found:,} faults" if found else f"{options.file}: no fault found")
    return FOUND_FAULTS if found else 0


def _show(options: argparse.Namespace, console: Console) -> int:
    from chatrlhf.data.long_rows import announce_if_long
    from chatrlhf.data.stage_rows import demonstrations, prompts, texts_of
    from chatrlhf.tools.inspect.statistics import records_in

    encoder = _encoder(options, console)
    records = (item for item in records_in(options.file, options.dataset) if isinstance(item[1], Conversation))
    for row, record in islice(records, options.row - 1, options.row - 1 + options.number):
        console.print(f"{row.place}", style="bold", highlight=False)
        announce_if_long(row.place, texts_of(record))
        for each in demonstrations(record):
            ids, labels = encoder.actor_row(each, options.loss_on)
            console.print(f"({measure(ids, labels, encoder)})", highlight=False)
            console.print(marked(ids, labels, encoder, console.is_terminal), soft_wrap=True)
        if not demonstrations(record):
            for prompt in prompts(record):
                console.print(shortened(encoder.prompt(prompt), encoder), markup=False, highlight=False)
        for answer in record.scored:
            console.print(f"score {answer.score}: {quoted(answer.completion)}", markup=False, highlight=False)
        for place in record.ranked:
            console.print(f"rank {place.rank}: {quoted(place.completion)}", markup=False, highlight=False)
        if record.pair is not None:
            console.print(f"rejected: {quoted(record.pair.rejected)}", markup=False, highlight=False)
        console.print()
    return 0


def _encoder(options: argparse.Namespace, console: Console) -> Encoder:
    from chatrlhf.data.encoder import Encoder
    from chatrlhf.data.stage_rows import texts_of
    from chatrlhf.data.templates import get_template
    from chatrlhf.models.loading.tokenizer import load_tokenizer, train_tokenizer
    from chatrlhf.tools.inspect.statistics import records_in

    tokenizer: Any
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer, "--tokenizer")
    else:
        records = (item[1] for item in records_in(options.file, options.dataset))
        kept = (record for record in records if isinstance(record, Conversation))
        # Of a row of megabytes the beginning is enough: it is a vocabulary for counting.
        texts = (text[:TINY_CHARACTERS] for record in islice(kept, TINY_ROWS) for text in texts_of(record))
        tokenizer = train_tokenizer(texts, TINY_VOCABULARY)
        console.print(
            f"tokens are those of a vocabulary of {len(tokenizer):,} made from the first {TINY_ROWS:,} records; "
            "--tokenizer names a model's",
            style="dim",
            highlight=False,
        )
    name = options.template or (SOURCES[options.dataset].template if options.dataset else "chatllama")
    return Encoder.of(tokenizer, get_template(name, "--template", tokenizer), options.context)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chatrlhf data", description="Look into a file of rows.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    stats = commands.add_parser("stats", help="counts, lengths in tokens, scores, repetitions, what a context cuts")
    check = commands.add_parser("check", help="every fault, with file, row and field")
    show = commands.add_parser("show", help="records as a model sees them, what is trained marked")
    for each in (stats, check, show):
        each.add_argument("file", type=Path, help="JSON, JSONL, CSV, Parquet or text; .gz too")
        each.add_argument(
            "--as", dest="dataset", metavar="NAME", type=str.upper, choices=SOURCES, help="rows of a public dataset"
        )
    for each in (stats, show):
        each.add_argument("--tokenizer", metavar="MODEL", help="a folder or hub id")
        each.add_argument("--template", metavar="NAME", help="as actor_config.template")
        each.add_argument("--context", type=whole_number(1), default=2048, metavar="N", help="tokens (%(default)s)")
    stats.add_argument("--picture", type=Path, metavar="FILE", help="write the histograms there, such as stats.png")
    check.add_argument("--stage", choices=STAGES, help="also look for what this stage needs")
    show.add_argument(
        "--row", type=whole_number(1), default=1, metavar="N", help="the first record to show (%(default)s)"
    )
    show.add_argument("-n", "--number", type=whole_number(1), default=3, metavar="N", help="how many (%(default)s)")
    show.add_argument("--loss-on", choices=("completion", "all_turns", "all"), default="completion")
    return parser
