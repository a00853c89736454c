"""The driver: `python artifacts/main.py artifacts/config/config.yaml --type ALL`, as `main.py` above it."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("chatrlhf") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chatrlhf.cli import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
