"""Words that the field has better ones for: `python tests/lint_words.py` names each place and fails.

The rules are in AGENTS.md. A word may stand where it is data (a fixture, a quotation): such lines are listed below.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SELF = Path(__file__).name

# What is banned, and what is written instead.
WORDS = {
    r"upon": "on, on top of",
    r"deal(?:s|t|ing)? (?:it |them )?out": "shard, split, assign",
    r"few bits": "quantized",
    r"lies? in": "is in",
    r"in the place of": "instead of",
    r"cannot be had": "is not supported, is not available",
    r"is had": "is available",
    r"goes on": "continues",
    r"gone on": "continued",
    r"nobody": "no one, never",
    r"(?:is|are|was|were|be) held to": "compared with, regularized to",
    r"let(?:s|ting)? go of": "free, release",
    r"made on the spot": "created on the fly",
    r"on paper": "on fake tensors",
    r"topolog(?:y|ies)": "actor-critic",
    r"(?:tokenis|quantis|normalis|initialis|optimis|serialis|summaris|recognis)\w+": "American spelling: -iz-",
    r"behaviour|colour|favour|modelling": "American spelling",
}
PATTERN = re.compile("|".join(rf"(\b(?:{word})\b)" for word in WORDS), re.IGNORECASE)
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".cff"}


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [ROOT / name for name in names if Path(name).suffix in SUFFIXES and Path(name).name != SELF]


def found_in(path: Path) -> list[str]:
    lines, name = path.read_text(encoding="utf-8").splitlines(), path.relative_to(ROOT)
    found = []
    for number, line in enumerate(lines, 1):
        for match in PATTERN.finditer(line):
            instead = list(WORDS.values())[match.lastindex - 1]
            found.append(f"{name}:{number}: '{match[0]}', write: {instead}")
    return found


def main() -> int:
    found = [line for path in tracked() for line in found_in(path)]
    print("\n".join(found) or "no banned word")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
