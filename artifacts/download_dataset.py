"""Write a public preference dataset as the three files that training reads.

    python artifacts/download_dataset.py ARLHF --path ./datasets --number_of_samples 200

ARLHF is Anthropic/hh-rlhf (its texts can be offensive), SHP is stanfordnlp/SHP. Actor rows, reward pairs and
prompts come from the same sampled pairs.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("chatrlhf") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chatrlhf.data.download import SOURCES, download  # noqa: E402
from chatrlhf.data.sources.shp import PAIRS_PER_POST, POST_CHARS  # noqa: E402
from chatrlhf.errors import UserError  # noqa: E402


def parse(argv: list[str] | None) -> argparse.Namespace:
    shp = f"SHP: of a post the first {POST_CHARS} characters are kept, and at most {PAIRS_PER_POST} pairs."
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=shp, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(SOURCES), type=str.upper)
    parser.add_argument("-p", "--path", type=Path, default="./datasets", help="folder to write (%(default)s)")
    parser.add_argument("-n", "--number_of_samples", type=int, default=200, help="pairs (%(default)s)")
    parser.add_argument(
        "--source", dest="source_dir", type=Path, metavar="DIR", help="read this copy in the hub's layout"
    )
    parser.add_argument("--subset", metavar="NAME", help="such as harmless-base or askculinary (all)")
    parser.add_argument("--split", default="train", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws other pairs (%(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite files that are there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    try:
        result = download(**vars(parse(argv)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(result.lines()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
