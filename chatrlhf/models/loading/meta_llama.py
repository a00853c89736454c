"""Meta's original LLaMA files, which transformers does not read: recognized, and the way to files that it does."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

# Its package holds the script; those of 4.57 and 5 do not.
WITH_THE_SCRIPT = "transformers==4.46.3"
SCRIPT = "transformers.models.llama.convert_llama_weights_to_hf"


def how_to_convert(name: str) -> str | None:
    """The command that makes a model's folder of one with Meta's files; None where there are no such files.

    Args:
        name: what the configuration names as a model.
    """
    folder = Path(name)
    parts = sorted(folder.glob("consolidated.*.pth"))
    if not parts or not (folder / "params.json").exists():
        return None
    target = folder.with_name(f"{folder.name}-hf")
    here, there = shlex.quote(str(folder)), shlex.quote(str(target))
    fetch = ""
    if not (folder / "tokenizer.model").exists():  # Meta's download has it a folder above
        fetch = f"cp {shlex.quote(str(folder.parent / 'tokenizer.model'))} {here} && "
    return (
        f'pip install "{WITH_THE_SCRIPT}" torch sentencepiece tiktoken accelerate (in an environment of its own), then '
        f"{fetch}python -m {SCRIPT} --input_dir {here} --output_dir {there} --num_shards {len(parts)} --llama_version "
        f"{_version(folder / 'params.json')}, and name {target} (1, 2, 3 or 3.1: the version sets the context)"
    )


def _version(params: Path) -> str:
    """Of LLaMA, as the script counts, as far as its dimensions tell; it sets the length of the context."""
    try:
        values = json.loads(params.read_text(encoding="utf-8"))
    except ValueError:
        values = {}
    if values.get("vocab_size", -1) > 100_000:
        return "3.1" if values.get("use_scaled_rope") else "3"
    if values.get("norm_eps") == 1e-6 and "n_kv_heads" not in values:
        return "1"
    return "2"
