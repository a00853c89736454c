"""Have a language model write more prompts for the RL stage, from a few.

    python artifacts/extend_rlhf_dataset.py --model google/flan-t5-xl --num_prompts 1000 --data_dir ./datasets

The few are those of rlhf_training_data.json, or else of actor_training_data.json, in the folder. New prompts that are
nearly one of them, or nearly each other, are left out. What is interrupted continues from there with the same command.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("chatrlhf") is None:  # a checkout that is not installed
    sys.path.insert(0, str(ROOT))

from chatrlhf.tools.synth.options import add_model_options, add_templates, positive  # noqa: E402
from chatrlhf.tools.synth.prompt_dataset import extend  # noqa: E402
from chatrlhf.tools.synth.session import guarded  # noqa: E402


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-n", "--num_prompts", "--num-prompts", type=positive, default=1000, help="new ones (%(default)s)")
    add("-d", "--data_dir", "--data-dir", type=Path, default="./datasets", help="folder of the data (%(default)s)")
    add_templates(parser, ROOT, "--templates", help="JSON with the key 'rlhf': what the prompts are for")
    add("--topics", type=Path, metavar="FILE", help="one a line, where there are no prompts to start from")
    add("--from", dest="examples", type=Path, metavar="FILE", help="the few, instead of the folder's")
    add("-o", "--output", type=Path, metavar="FILE", help="(rlhf_training_data_extended.json in the folder)")
    add_model_options(parser, temperature=1.0, max_tokens=256, model="google/flan-t5-xl")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return guarded(extend, parse(argv))


if __name__ == "__main__":
    raise SystemExit(main())
