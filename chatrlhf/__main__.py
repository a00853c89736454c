"""``python -m chatrlhf``."""

from chatrlhf.runtime.import_path import demote_script_folder

demote_script_folder()  # before more is imported: a file of yours named random.py is not Python's random

from chatrlhf.cli import main  # noqa: E402

raise SystemExit(main())
