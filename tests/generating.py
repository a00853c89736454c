"""What tests of generated data share: the scripts of artifacts/, and the files they read and write."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def script_main(name: str):
    """`main` of a script in artifacts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "artifacts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def written(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON or JSONL file."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def save(path: Path, rows: Any) -> Path:
    """Rows as a JSON file."""
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def told(body: dict[str, Any]) -> str:
    """The last message of a request."""
    return body["messages"][-1]["content"]
