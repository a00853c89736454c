"""Files that are damaged at random: `data check`, training and mixtures say the same, in one line each."""

import csv
import gzip
import io
import json
import random

import pytest

from chatrlhf.config import load_config
from chatrlhf.data.files import open_rows
from chatrlhf.data.records import from_json, read_records
from chatrlhf.errors import ConfigError, DataError
from chatrlhf.tools.inspect.validation import faults_in

SAYS = ["a", "b, c", 'say "hi"', "two\nlines", "é𝄞\u2028", "None"]
BITS = [b'"', b"'", b"\0", b"\xff", b"\xef\xbb\xbf", b",", b";", b"{", b"]", b"\n", b"\r", b":", b"NaN", b"\\ud800"]
BITS += [b"[" * 120, b'{"a":' * 2000, b"9" * 5000, b"<<: 3", b"!!int x", b"&a [*a]", b"- ", b"\t", b"1: 2", b"---\n"]
ENCODINGS = ["utf-16", "utf-16-le", "latin-1", "utf-8-sig"]
# Said of what can be read and trained on, and is of little use.
OF_LITTLE_USE = ("it is empty", "a completion is empty", "are the same", "no rows that can be read")


def damaged(content: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.choice([1, 1, 2, 6])):
        at = chance.randrange(len(content) + 1)
        kind = chance.randrange(7)
        if kind < 3:
            content = content[:at] + chance.choice(BITS) + content[at:]
        elif kind == 3:
            content = content[:at]
        elif kind == 4:
            content = content[:at] + content[at + 1 :]
        elif kind == 5:
            content = content[:at] + chance.randbytes(3) + content[at:]
        else:
            content = content.decode("utf-8", "replace").encode(chance.choice(ENCODINGS), "replace")
    return content


def rows_of(kind: str, chance: random.Random) -> bytes:
    rows = [{"user_input": chance.choice(SAYS), "completion": chance.choice(SAYS), "score": n} for n in range(4)]
    if kind == ".csv":
        out = io.StringIO()
        table = csv.DictWriter(out, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
        return out.getvalue().encode()
    if kind == ".json":
        return json.dumps(rows, indent=chance.choice([None, 1])).encode()
    return "".join(json.dumps(row, indent=chance.choice([None, None, 1])) + "\n" for row in rows).encode()


@pytest.mark.parametrize("seed", range(5))
def test_damaged_files_of_rows(tmp_path, seed):
    chance = random.Random(seed)
    for number in range(20):
        kind = chance.choice([".jsonl", ".json", ".csv", ".txt", ".parquet"])
        content = damaged(rows_of(kind, chance), chance)
        path = tmp_path / f"{number}{kind}"
        if kind != ".parquet" and chance.random() < 0.3:
            path, content = tmp_path / f"{number}{kind}.gz", gzip.compress(content)
            content = damaged(content, chance) if chance.random() < 0.5 else content
        path.write_bytes(content)
        found = list(faults_in(path))
        assert all(fault.startswith(f"{path}") and "\n" not in fault for fault in found), found
        found = [fault for fault in found if not fault.endswith(OF_LITTLE_USE)]
        for read in (read_records, lambda path: map(from_json, open_rows(path))):
            try:
                list(read(path))
            except DataError as error:
                assert str(error) in found or str(error).startswith(f"{path}: it holds no rows")
            else:
                assert found == []


@pytest.mark.parametrize("seed", range(5))
def test_damaged_yaml(tmp_path, seed):
    chance = random.Random(seed)
    text = "actor_config:\n  lr: 1.0e-5\n  datasets:\n    - {name: a, size: 3}\ntrainer_config: {lam: 0.9}\n"
    path = tmp_path / "config.yaml"
    for _ in range(20):
        path.write_bytes(damaged(text.encode(), chance))
        try:
            load_config(path)
        except ConfigError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
