"""Have a language model write dialogues to fine-tune the actor on, playing both sides.

    python artifacts/generate_actor_dataset.py --model NAME --num_conversations 1000 --output_dir ./datasets
    python artifacts/generate_actor_dataset.py --model google/flan-t5-xl --from my_examples.json

From the template 'actor' and a list of topics, or from ten or more examples of your own: then new requests like theirs
are written, and answered in their manner. What is interrupted continues from there with the same command.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("chatrlhf") is None:  # a checkout that is not installed
    sys.path.insert(0, str(ROOT))

from chatrlhf.tools.synth.actor_dataset import generate  # noqa: E402
from chatrlhf.tools.synth.options import add_model_options, add_templates, positive  # noqa: E402
from chatrlhf.tools.synth.session import guarded  # noqa: E402


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-n", "--num_conversations", "--num-conversations", type=positive, default=1000, help="(%(default)s)")
    add("-o", "--output_dir", "--output-dir", type=Path, default="./datasets", help="folder to write (%(default)s)")
    add_templates(parser, ROOT, "--templates", help="JSON with the keys 'actor' and, for --from, 'rlhf'")
    add("--topics", type=Path, metavar="FILE", help="one topic a line (a list of everyday ones)")
    add("--from", dest="examples", type=Path, metavar="FILE", help="rows with user_input and completion, ten or more")
    add("--exchanges", type=positive, default=2, metavar="N", help="most in a dialogue (%(default)s)")
    add_model_options(parser, temperature=1.0, max_tokens=512)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return guarded(generate, parse(argv))


if __name__ == "__main__":
    raise SystemExit(main())
