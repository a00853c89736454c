"""What a command leaves: a file of rows, and beside it what was put aside, what was done, and the journal.

NAME.json              the rows
NAME.meta.json         model, licence, options, counts, tokens, cost; whether all rows are there
NAME.quarantine.jsonl  replies that are no rows, each with its reason
NAME.journal.jsonl     every answer; with it the same command asks nothing twice

The last two can be read by their owner alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from chatrlhf.data.files import write_rows
from chatrlhf.errors import DataError
from chatrlhf.runtime.atomic_files import PRIVATE, replace_file
from chatrlhf.runtime.file_hash import sha256_of
from chatrlhf.runtime.publication import Publication, Write


@dataclass(frozen=True)
class Output:
    """The files of one command, by the name of its rows'."""

    path: Path

    @property
    def meta(self) -> Path:
        """What was done."""
        return self._beside("meta.json")

    @property
    def quarantine(self) -> Path:
        """What was put aside."""
        return self._beside("quarantine.jsonl")

    @property
    def journal(self) -> Path:
        """Every answer."""
        return self._beside("journal.jsonl")

    def held(self) -> Publication:
        """The files' lock, and their publication together. Raises as that does."""
        return Publication(self.path.parent, self.path.stem, "--output", self.path.name)

    def check(self, force: bool, publication: Publication | None = None) -> None:
        """Before anything is asked.

        A file of this name that an earlier run of ours has left unfinished, and no one has changed since, is continued
        with; any other is not overwritten without ``force``.

        Args:
            publication: knows what a killed call has left; None where nothing will be written.

        Raises:
            DataError: it is a user's, it is finished, or rows cannot be written by that name.
        """
        if self.path.suffix not in (".json", ".jsonl"):
            raise DataError(f"--output: {self.path} has to end with .json or .jsonl")
        if not self._is_free(publication) and not force and not self._is_unfinished():
            raise DataError(f"refused to overwrite {self.path}; give another --output, or --force")

    def write(
        self, publication: Publication, rows: list[dict[str, Any]], aside: list[dict[str, Any]], about: dict[str, Any]
    ) -> None:
        """Write all of it, together. Raises DataError where that is not possible; what was answered is kept."""

        def write_meta(path: Path) -> None:
            sha256 = sha256_of(path.with_name(self.path.name))
            text = json.dumps(
                {**about, "rows": len(rows), "quarantined": len(aside), "sha256": sha256}, indent=2, ensure_ascii=False
            )
            replace_file(path, f"{text}\n")

        files: dict[Path, Write] = {self.path: partial(write_rows, rows=rows)}
        if aside or self.quarantine.exists():
            files[self.quarantine] = partial(write_rows, rows=aside, mode=PRIVATE)
        files[self.meta] = write_meta
        # Whether a file of rows is ours is seen by what lies beside it, which is moved before it is.
        publication.publish(files, force=True, order=[*files][::-1])

    def _is_free(self, publication: Publication | None) -> bool:
        return not (publication.in_the_way([self.path]) if publication else self.path.exists())

    def _is_unfinished(self) -> bool:
        try:
            about = json.loads(self.meta.read_text(encoding="utf-8"))
            return about["complete"] is False and about["sha256"] == sha256_of(self.path)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _beside(self, end: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.{end}")
