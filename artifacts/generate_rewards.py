"""Score a file of completions with a language model as the judge.

    python artifacts/generate_rewards.py ./datasets/reward_training_data.json --model NAME
    python artifacts/generate_rewards.py my.json --base-url http://localhost:8000/v1 --judgements 3 --calibrate 50

Only what has no score is judged. The file itself is left alone: what comes of it goes into a new one, whose path to
set in the configuration is printed. What is interrupted continues from there with the same command.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("chatrlhf") is None:  # a checkout that is not installed
    sys.path.insert(0, str(ROOT))

from chatrlhf.tools.synth.options import add_model_options, add_templates, natural, positive  # noqa: E402
from chatrlhf.tools.synth.reward_dataset import generate  # noqa: E402
from chatrlhf.tools.synth.session import guarded  # noqa: E402


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", type=Path, help="rows with user_input, completion and score: null; or chosen, rejected")
    add_templates(
        parser,
        ROOT,
        "-r",
        "--reward_template",
        "--reward-template",
        help="JSON with the key 'reward': rules, and where {user_input} and {completion} stand",
    )
    add("-o", "--output", type=Path, metavar="FILE", help="(the dataset's name with _scored, or _pairs)")
    add("--scale", type=float, nargs=2, default=(0.0, 5.0), metavar=("LOW", "HIGH"), help="of the scores (0 5)")
    add("-j", "--judgements", type=positive, default=1, metavar="N", help="of a completion; the mean is its score")
    add("--pairs", action="store_true", help="compare completions of one prompt, each two in both orders")
    add("--calibrate", type=natural, nargs="?", const=100, default=0, metavar="N", help="judge rows people have scored")
    add("--augment", type=natural, default=0, metavar="N", help="also write and score N new rows like the scored ones")
    add("--free", action="store_true", help="let a local judge write more than its verdict")
    add_model_options(parser, temperature=0.1, max_tokens=256)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return guarded(generate, parse(argv))


if __name__ == "__main__":
    raise SystemExit(main())
