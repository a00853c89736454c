"""The driver: `python main.py config.yaml --type ALL`. Installed, the same command is `chatrlhf`."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("chatrlhf") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from chatrlhf.runtime.import_path import demote_script_folder  # noqa: E402

demote_script_folder()  # before more is imported: a file of yours named random.py is not Python's random

from chatrlhf.cli import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
