"""Write a public dataset as the files that training reads.

    python artifacts/download_dataset.py ARLHF --path ./datasets --number_of_samples 200
    python artifacts/download_dataset.py --list

ARLHF is Anthropic/hh-rlhf (its texts can be offensive), SHP is stanfordnlp/SHP. Actor rows, judged rows and
prompts come from the same sampled rows.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

if importlib.util.find_spec("chatrlhf") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chatrlhf.data.download import SOURCES, download  # noqa: E402
from chatrlhf.data.sources.catalogue import listing  # noqa: E402
from chatrlhf.data.sources.shp import PAIRS_PER_POST, POST_CHARS  # noqa: E402
from chatrlhf.errors.boundary import exit_status  # noqa: E402
from chatrlhf.runtime.signals import listening  # noqa: E402


def parse(argv: list[str] | None) -> argparse.Namespace:
    shp = f"SHP: of a post the first {POST_CHARS} characters are kept, and at most {PAIRS_PER_POST} pairs."
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=shp, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SOURCES, type=str.upper, nargs="?")
    parser.add_argument("--list", action="store_true", help="show the datasets with their size and licence")
    parser.add_argument("-p", "--path", type=Path, default="./datasets", help="folder to write (%(default)s)")
    parser.add_argument("-n", "--number_of_samples", type=int, default=200, help="rows (%(default)s)")
    parser.add_argument("--source", dest="source_dir", type=Path, metavar="PATH", help="read this copy, or file of it")
    parser.add_argument("--subset", metavar="NAME", help="such as harmless-base or askculinary (all)")
    parser.add_argument("--split", default="train", help="(%(default)s)")
    parser.add_argument("--lang", metavar="CODE", help="of OASST1 one language only, such as en")
    parser.add_argument("--seed", type=int, default=0, help="draws other rows (%(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite files that are there")
    options = parser.parse_args(argv)
    if not options.list and options.name is None:
        parser.error("give the name of a dataset, or --list")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with listening():
        return exit_status(lambda: _download(**vars(options)), "stopped before all files were written")


def _download(**words: Any) -> int:
    print("\n".join(listing() if words.pop("list") else download(**words).lines()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
