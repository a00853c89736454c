"""Small files in the shapes of the datasets that the recipes name, and models that stand in for the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny import llama
from torch import nn

from chatrlhf.models.loading.tokenizer import train_tokenizer

ROWS = 24
THINGS = ("tea", "the sea", "a hat", "old books", "rain", "the moon", "a cat", "bread")


def write_datasets(folder: Path, *names: str) -> dict[str, Path]:
    """One file of rows for each dataset, by its name in a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name in names:
        path = folder / f"{name}.jsonl"
        rows = [SHAPES[name.upper().replace("-", "_")](i, _asked(i, name), _told(i)) for i in range(ROWS)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths[name] = path
    return paths


def entries(datasets: list[Any], folder: Path) -> list[dict[str, Any]]:
    """A recipe's `datasets` read from small files; what is held out is small, too."""
    made = []
    for entry in datasets:
        options = {key: value for key, value in entry.model_dump(exclude_unset=True).items() if key != "name"}
        if options.get("max_val_set"):
            options |= {"max_val_set": 2, "val_split": 0.1}
        if options.get("max_chunk_size"):
            options["max_chunk_size"] = 400
        options.pop("size", None)
        source = write_datasets(folder, entry.name)[entry.name]
        made.append({"name": entry.name, "source": str(source), **options})
    return made


def write_standin(folder: Path, seed: int = 0, width: int = 128, positions: int = 64, **options: Any) -> Path:
    """A LLaMA of two layers with a tokenizer of its own, in a folder."""
    tokenizer = train_tokenizer([text for i in range(ROWS) for text in (_asked(i), _told(i), _long(i))], 420)
    model = llama(
        seed=seed,
        vocab=len(tokenizer),
        width=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        max_position_embeddings=positions,
        **options,
    )
    shrink(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def shrink(model: nn.Module) -> nn.Module:
    """To weights of the usual size: drawn as `tiny` does, a model of 128 channels is certain of everything."""
    for weight in model.parameters():
        if weight.dim() == 2:
            weight *= 0.15
    return model


def _asked(i: int, where: str = "OASST1") -> str:
    return f"What is {i} of {THINGS[i % len(THINGS)]} in {where}?"


def _told(i: int) -> str:
    return f"It is {THINGS[i % len(THINGS)]}, {i} times."


def _long(i: int, where: str = "PILE") -> str:
    return f"Of {where}, {i}. " + " ".join(f"{_asked(j, where)} {_told(j)}" for j in range(i, i + 12))


def _soda(i: int, asked: str, told: str) -> dict[str, Any]:
    speakers = ["Garry", "Bob", "Garry", "Bob"]
    about = {"head": "PersonX asks", "relation": "xWant", "tail": "to know", "literal": "Garry wants to know."}
    people = {"PersonX": "Garry", "PersonY": "Bob", "PersonZ": ""}
    dialogue = [asked, told, "Really?", f"Really: {told}"]
    scene = {"narrative": f"Garry asks Bob of {THINGS[i % len(THINGS)]}.", "dialogue": dialogue, "speakers": speakers}
    return about | scene | people | {"original_index": i, "split": "train", "head_answer": "Yes"}


def _oasst(i: int, asked: str, told: str) -> dict[str, Any]:
    common = {"lang": "en", "review_result": True, "deleted": False, "synthetic": False}
    replies = [
        common | {"message_id": f"{i}-{rank}", "text": text, "role": "assistant", "rank": rank, "replies": []}
        for rank, text in enumerate((told, f"No {i}."))
    ]
    prompt = common | {"message_id": str(i), "text": asked, "role": "prompter", "replies": replies}
    return {"message_tree_id": str(i), "tree_state": "ready_for_export", "prompt": prompt}


def _hh(i: int, asked: str, told: str) -> dict[str, Any]:
    start = f"\n\nHuman: {asked}\n\nAssistant:"
    return {"chosen": f"{start} {told}", "rejected": f"{start} No {i}."}


def _shp(i: int, asked: str, told: str) -> dict[str, Any]:
    votes = {"score_A": 9, "score_B": 3, "score_ratio": 3.0, "labels": 1, "upvote_ratio": 0.9, "domain": "askbaking"}
    return {"post_id": f"x{i}", "history": asked, "human_ref_A": told, "human_ref_B": f"No {i}."} | votes


SHAPES = {
    "SODA": _soda,
    "OASST1": _oasst,
    "ARLHF": _hh,
    "SHP": _shp,
    "GPT4ALL": lambda i, asked, told: {"prompt": f"<p>{asked}</p>", "response": told, "source": "made"},
    "ALPACA": lambda i, asked, told: {"instruction": asked, "input": THINGS[i % len(THINGS)], "output": told},
    "ORCA_CHAT": lambda i, asked, told: {
        "instruction": "You are an AI assistant." if i % 2 else "",
        "conversation": [{"input": asked, "output": told}, {"input": "And now?", "output": f"Now {told}"}],
    },
    "DOLPHIN": lambda i, asked, told: {"instruction": "", "input": asked, "output": told},
    "AIROBOROS": lambda i, asked, told: {"instruction": asked, "response": told, "category": "made"},
    "FANFICS": lambda i, asked, told: {"TEXT": _long(i, "fanfics")},
    "RED_PAJAMA": lambda i, asked, told: {"text": _long(i, "red_pajama"), "meta": "{'source': 'made'}"},
    "PILE": lambda i, asked, told: {"text": _long(i), "meta": {"pile_set_name": "made"}},
}
