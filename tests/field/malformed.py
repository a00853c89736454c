"""Malformed inputs, made from a seed: files, YAML, folders and models that people bring damaged.

`python tests/field/malformed.py` runs 300 of them, prints what each that fails has said, and how many were a clear
error, accepted, a traceback or slow. Given arguments, it takes all whose names hold one of these ("" is in each, some
four thousand with rows and with a dozen values for every key of the schema).
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' helpers, where this is run by itself

from malformed_runs import Case, Outcome, run, sound_folder  # noqa: E402
from odd_values import odd_values  # noqa: E402

from chatrlhf.data import render_limits  # noqa: E402

SEED = 11


# ---------------------------------------------------------------- damage to one file

Damage = Callable[[Path, random.Random], None]


def of_bytes(make: Callable[[bytes, random.Random], bytes]) -> Damage:
    def damage(path: Path, draw: random.Random) -> None:
        path.write_bytes(make(path.read_bytes(), draw))

    return damage


def into(make: Callable[[Path], None]) -> Damage:
    """Something that is no file in its place."""

    def damage(path: Path, draw: random.Random) -> None:
        path.unlink()
        make(path)

    return damage


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n"
DAMAGES: dict[str, Damage] = {
    "empty": of_bytes(lambda old, draw: b""),
    "cut off": of_bytes(lambda old, draw: old[: draw.randrange(1, max(2, len(old) - 2))]),
    "noise": of_bytes(lambda old, draw: b"\xff\xfe\x00" + draw.randbytes(draw.randrange(20, 400))),
    "noise inside": of_bytes(lambda old, draw: old[: len(old) // 2] + b"\xff\xc0\x80" + old[len(old) // 2 :]),
    "zeros": of_bytes(lambda old, draw: bytes(len(old))),
    "a pointer of git-lfs": of_bytes(lambda old, draw: LFS),
    "a web page": of_bytes(lambda old, draw: b"<!DOCTYPE html><html><body>404</body></html>"),
    "a zip's beginning": of_bytes(lambda old, draw: b"PK\x03\x04" + draw.randbytes(30)),
    "a gzip's beginning": of_bytes(lambda old, draw: b"\x1f\x8b\x08\x00" + draw.randbytes(30)),
    "an object": of_bytes(lambda old, draw: b"{}"),
    "a list": of_bytes(lambda old, draw: json.dumps([draw.randrange(9)] * 3).encode()),
    "a number": of_bytes(lambda old, draw: b"7"),
    "null": of_bytes(lambda old, draw: b"null"),
    "a text": of_bytes(lambda old, draw: b'"text"'),
    "deep": of_bytes(lambda old, draw: b"[" * 100_000),
    "UTF-16": of_bytes(lambda old, draw: '{"ä": 1}\n'.encode("utf-16")),
    "a folder": into(lambda path: path.mkdir()),
    "a dead link": into(lambda path: path.symlink_to("nowhere")),
    "a link to itself": into(lambda path: path.symlink_to(path.name)),
}


@dataclass(frozen=True)
class Target:
    """A file, and the command that reads it."""

    path: str
    words: tuple[str, ...] = ("c.yaml", "--type", "ACTOR")
    says: tuple[str, ...] = ()  # one of these stands in the message; else the file's name or its folder's
    owner: str = ""  # which part of the package answers for it
    harmless: tuple[str, ...] = ()  # with these it is read as it is meant


ACTOR, RL = ("c.yaml", "--type", "ACTOR"), ("c.yaml", "--type", "RL")
RESUMED = ("c.yaml", "--output-dir", "done", "--resume", "--type")
SCRIPT = ("artifacts/extend_rlhf_dataset.py", "--from", "a.jsonl", "-n", "1", "--model", "./base", "--dry-run")
MERGE = ("export", "merge", "--model", "adapters", "--output", "merged")
WITH_FUNCTION = (*RL, "--set", "reward_config.reward_fn=rewarding:score")


def data(name: str) -> tuple[str, ...]:
    return (*ACTOR, "--set", f"actor_config.train_dataset_path={name}")


NOTHING = ("empty", "an object", "null")  # in YAML
READABLE_TEXT = tuple(
    kind for kind in DAMAGES if kind not in ("noise", "noise inside", "UTF-16", "a folder", "a dead link")
)
TARGETS = [
    Target("base/config.json", owner="boundary"),
    Target("base/tokenizer.json", owner="boundary"),
    Target("base/tokenizer_config.json", owner="boundary"),
    Target("base/model.safetensors", owner="weights"),
    Target("base/generation_config.json", owner="eos", harmless=("an object", "a dead link")),
    Target("base/chat_template.jinja", (*ACTOR, "--set", "actor_config.template=chat"), owner="templates"),
    Target("own.jinja", (*ACTOR, "--set", "actor_config.template=own.jinja"), owner="templates"),
    Target("a.jsonl", data("a.jsonl"), owner="files"),
    Target("a.json", data("a.json"), owner="files"),
    Target("a.csv", data("a.csv"), owner="files", harmless=("cut off",)),
    Target("a.parquet", data("a.parquet"), owner="files"),
    Target("a.json.gz", data("a.json.gz"), owner="files"),
    Target("a.jsonl", ("data", "stats", "a.jsonl"), owner="files", harmless=("empty",)),
    Target("a.parquet", ("data", "show", "a.parquet"), owner="files"),
    Target("base/tokenizer.json", ("data", "stats", "a.jsonl", "--tokenizer", "base"), owner="boundary"),
    Target("c.yaml", ACTOR, owner="files", harmless=NOTHING),
    Target(
        "peft.yaml",
        (*ACTOR, "--set", "actor_config.peft_enable=true", "--set", "actor_config.peft_config_path=peft.yaml"),
        owner="files",
        harmless=NOTHING,
    ),
    Target(
        "ds.json",
        (*ACTOR, "--set", "actor_config.deepspeed_enable=true", "--set", "actor_config.deepspeed_config_path=ds.json"),
        owner="boundary",
    ),
    Target("adapters/adapter_config.json", (*ACTOR, "--set", "actor_config.model=adapters"), owner="weights"),
    Target("adapters/adapter_model.safetensors", (*ACTOR, "--set", "actor_config.model=adapters"), owner="weights"),
    Target(
        "adapters/adapter_config.json",
        ("export", "merge", "--model", "adapters", "--output", "merged"),
        owner="weights",
    ),
    Target(
        "base/model.safetensors",
        ("export", "delta", "--base", "base", "--target", "judge", "--output", "delta"),
        owner="weights",
    ),
    Target("base/config.json", ("eval", "perplexity", "text.txt", "--models", "base"), owner="boundary"),
    Target("text.txt", ("eval", "perplexity", "text.txt", "--models", "base"), owner="files", harmless=READABLE_TEXT),
    Target("base/config.json", ("plan", "--compare", "base"), owner="boundary"),
    Target("rewarding.py", WITH_FUNCTION, says=("reward_fn", "reward function"), owner="boundary"),
    Target("done/manifest.json", (*RESUMED, "ACTOR"), owner="boundary", harmless=("an object",)),
    Target("done/reward/reward_model.json", (*RL, "--output-dir", "done"), owner="boundary"),
    Target("templates.json", (*SCRIPT, "--templates", "templates.json"), owner="boundary", harmless=("an object",)),
    Target("topics.txt", (*SCRIPT, "--topics", "topics.txt"), owner="boundary", harmless=READABLE_TEXT),
]

# ---------------------------------------------------------------- the groups of cases


def file_cases(draw: random.Random) -> Iterator[Case]:
    for target in TARGETS:
        for kind, damage in DAMAGES.items():
            if kind not in target.harmless:
                seed = draw.randrange(2**32)
                says = target.says or (Path(target.path).name, target.path.split("/")[0])
                yield Case(
                    f"{' '.join(target.words[:3])}: {target.path} is {kind}",
                    target.owner,
                    lambda folder, damage=damage, path=target.path, seed=seed: damage(
                        folder / path, random.Random(seed)
                    ),
                    target.words,
                    says,
                )


def edited(path: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Damage to a JSON file: its content is changed."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / path).read_text())
        if path.endswith("manifest.json"):  # by whoever mends its checksum, too
            content.pop("sha256", None)
        changed = change(content)
        (folder / path).write_text(json.dumps(content if changed is None else changed))

    return damage


def written(path: str, text: str | bytes) -> Callable[[Path], None]:
    """Damage to a file: it holds something else."""
    return lambda folder: (folder / path).write_bytes(text.encode() if isinstance(text, str) else text) and None


CONFIG_FIELDS: dict[str, tuple[Any, ...]] = {
    "hidden_size": (-16, 0, "sixteen", None, 1.5, 10**12, True, [16]),
    "num_hidden_layers": (-1, 0, "two", 10**9, 2.5),
    "num_attention_heads": (-2, 0, "two", 10**7),
    "num_key_value_heads": (-1, 0, "one"),
    "intermediate_size": (-32, 0, "x", 10**12),
    "vocab_size": (-1, 0, "x", 10**12),
    "max_position_embeddings": (-1, 0, "x"),
    "model_type": ("no_such_model", 5, None, ["llama"], ""),
    "hidden_act": ("no_such_activation", 5),
    "rope_parameters": ("x", {"rope_type": "no_such"}, [1]),
    "quantization_config": ("x",),
    "layer_types": ("x", ["no_such", "no_such"]),
    "dtype": ("float99",),
}
TOKENIZER_CHANGES: dict[str, Callable[[Any], Any]] = {
    "without a model": lambda content: content.pop("model") and None,
    "without added tokens": lambda content: content.pop("added_tokens") and None,
    "with an unknown kind of model": lambda content: content["model"].update(type="Unknown"),
    "without a vocabulary": lambda content: content["model"].pop("vocab") and None,
    "with an empty vocabulary": lambda content: content["model"].update(vocab={}),
    "with merges of unknown tokens": lambda content: content["model"].update(merges=[["no", "such"]]),
    "with merges that are numbers": lambda content: content["model"].update(merges=[1, 2]),
    "with negative ids": lambda content: content["model"]["vocab"].update(a=-5),
    "with an unknown post-processor": lambda content: content.update(post_processor={"type": "Unknown"}),
    "with an unknown pre-tokenizer": lambda content: content.update(pre_tokenizer={"type": "Unknown"}),
    "with a decoder that is a list": lambda content: content.update(decoder=[1]),
    "with added tokens that are texts": lambda content: content.update(added_tokens=["<|endoftext|>"]),
}
TOKENIZER_FIELDS: dict[str, tuple[Any, ...]] = {
    "eos_token": (5, {"content": 5}, ["x"]),
    "pad_token": (5, {"no": "content"}),
    "added_tokens_decoder": ("x", {"a": "b"}, [1]),
}


def model_cases() -> Iterator[Case]:
    for name, values in CONFIG_FIELDS.items():
        for value in values:
            change = edited("base/config.json", lambda content, name=name, value=value: content.update({name: value}))
            yield Case(f"config.json with {name} {value!r}", "boundary", change, ACTOR, ("base",))
    for name, change in TOKENIZER_CHANGES.items():
        yield Case(f"tokenizer.json {name}", "boundary", edited("base/tokenizer.json", change), ACTOR, ("base",))
    for name, values in TOKENIZER_FIELDS.items():
        for value in values:
            file = "base/tokenizer_config.json"
            change = edited(file, lambda content, name=name, value=value: content.update({name: value}))
            yield Case(f"tokenizer_config.json with {name} {value!r}", "boundary", change, ACTOR, ("base",))


TEMPLATES = {
    "an unknown tag": "{% foo %}",
    "a block that is never closed": "{% for m in messages %}{{ m.content }}",
    "an unknown filter": "{{ messages | no_such_filter }}",
    "an unknown function": "{{ no_such_function(messages) }}",
    "a field of nothing": "{{ nothing.at.all }}",
    "a message too many": "{{ messages[99].content }}",
    "a division by zero": "{{ 1 // 0 }}",
    "a long range": "{% for i in range(10**9) %}x{% endfor %}",
    "a macro that calls itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "a text without end": "{{ 'a' * 10**15 }}",
    "loops without end": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "a way into Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "another file": "{% include 'other.jinja' %}",
    "a refusal": "{{ raise_exception('no') }}",
    "a text and a number": "{{ 'a' + 1 }}",
    "nothing": "",
    "no message": "Hello",
    "a dictionary too few": "{{ messages[0].content.no.such }}",
    "an operator too many": "{{ messages + + }}",
}


def template_cases() -> Iterator[Case]:
    own = (*ACTOR, "--set", "actor_config.template=own.jinja")
    chat = (*ACTOR, "--set", "actor_config.template=chat")
    for name, text in TEMPLATES.items():
        yield Case(f"own.jinja with {name}", "templates", written("own.jinja", text), own, ("own.jinja",))
        says = ("template", "base")
        yield Case(
            f"chat_template.jinja with {name}", "templates", written("base/chat_template.jinja", text), chat, says
        )


DS_CHANGES: dict[str, Any] = {
    "no sections": {},
    "a section that is a number": {"zero_optimization": 2},
    "a stage that is a text": {"zero_optimization": {"stage": "two"}},
    "a stage that there is not": {"zero_optimization": {"stage": 7}},
    "a stage that is a list": {"zero_optimization": {"stage": [2]}},
    "bf16 that is true": {"zero_optimization": {"stage": 2}, "bf16": True},
    "fp16 that is a list": {"zero_optimization": {"stage": 2}, "fp16": [1]},
    "a scheduler that is a text": {"zero_optimization": {"stage": 2}, "scheduler": "WarmupLR"},
    "parameters that are a number": {"zero_optimization": {"stage": 2}, "optimizer": {"params": 5}},
    "a batch that is a text": {"zero_optimization": {"stage": 2}, "train_batch_size": "many"},
}
RECORDS: dict[str, Any] = {
    "stages that are a list": {"stages": [], "config": {}},
    "a stage that is a text": {"stages": {"ACTOR": "done"}, "config": {}},
    "a stage without output": {"stages": {"ACTOR": {"status": "done"}}, "config": {}},
    "an output that is a number": {"stages": {"ACTOR": {"status": "done", "output": 1, "metrics": {}}}, "config": {}},
    "metrics that are a list": {"stages": {"ACTOR": {"status": "done", "output": "a", "metrics": []}}, "config": {}},
    "a configuration that is a text": {"stages": {}, "config": "x"},
}


def again(stage: str) -> Callable[[Path], None]:
    """A stage that has not ended yet, with the checkpoints of one that has."""
    return edited("done/manifest.json", lambda content: content["stages"].pop(stage) and None)


def both(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for each in damages:
            each(folder)

    return damage


def checkpoint_of(folder: Path, stage: str) -> Path:
    return sorted((folder / "done/checkpoints" / stage).iterdir())[-1]


def in_checkpoint(stage: str, file: str, damage: Damage, seed: int, rehash: bool) -> Callable[[Path], None]:
    """Damage to a checkpoint's file; with ``rehash`` the list of hashes is mended, as a curious user might."""

    def damaged(folder: Path) -> None:
        from chatrlhf.runtime.atomic_files import CONTENTS, _describe

        place = checkpoint_of(folder, stage)
        damage(place / file, random.Random(seed))
        if rehash:
            listed = json.loads((place / CONTENTS).read_text())
            listed[file] = _describe(place / file)
            (place / CONTENTS).write_text(json.dumps(listed))

    return both(again(stage), damaged)


def record_cases(draw: random.Random) -> Iterator[Case]:
    words = next(target.words for target in TARGETS if target.path == "ds.json")
    for name, content in DS_CHANGES.items():
        yield Case(f"ds.json with {name}", "boundary", written("ds.json", json.dumps(content)), words, ("ds.json",))
    for name, content in RECORDS.items():
        damage = written("done/manifest.json", json.dumps(content))
        yield Case(f"manifest.json with {name}", "boundary", damage, (*RESUMED, "ACTOR"), ("manifest.json",))
    for stage in ("ACTOR", "REWARD", "RL"):
        for kind in ("empty", "noise", "a list", "an object", "deep", "a folder", "a dead link", "a link to itself"):
            damage = in_checkpoint(stage, "contents.json", DAMAGES[kind], draw.randrange(2**32), False)
            says = (f"checkpoints/{stage}",)
            yield Case(f"contents.json of {stage} is {kind}", "boundary", damage, (*RESUMED, stage), says)
    for file, kinds in {
        "state.json": ("empty", "noise", "a list", "an object", "null", "deep"),
        "training.pt": ("empty", "noise", "cut off", "a zip's beginning", "an object"),
    }.items():
        for kind in kinds:
            for rehash in (False, True):
                damage = in_checkpoint("RL", file, DAMAGES[kind], draw.randrange(2**32), rehash)
                name = f"{file} of RL is {kind}" + (", hashed anew" if rehash else "")
                yield Case(name, "boundary", damage, (*RESUMED, "RL"), ("checkpoints/RL",))
    noise = both(again("ACTOR"), lambda folder: DAMAGES["noise"](folder / "done/metrics.jsonl", random.Random(1)))
    yield Case("metrics.jsonl is noise", "boundary", noise, (*RESUMED, "ACTOR"), ("metrics.jsonl",))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML_TEXTS: dict[str, str | bytes] = {
    "a list": "- a\n- b\n",
    "a text": "just words\n",
    "a number": "7\n",
    "tabs": "actor_config:\n\tmodel: base\n",
    "a null character": "actor_config:\n  model: ba\0se\n",
    "a bell": "actor_config:\n  model: ba\ase\n",
    "Latin-1": "actor_config:\n  model: b\xe4se\n".encode("latin-1"),
    "UTF-16": "actor_config:\n  model: base\n".encode("utf-16"),
    "a quote that is never closed": 'actor_config:\n  model: "base\n',
    "a bracket that is never closed": "actor_config: {model: base\n",
    "a bad indentation": "actor_config:\n  model: base\n    lr: 1\n",
    "an unknown alias": "actor_config: *missing\n",
    "an alias of itself": "actor_config: &a\n  model: *a\n",
    "aliases without end": BOMB,
    "aliases without end in a section": BOMB + "actor_config: *i\n",
    "a tag of Python": "actor_config: !!python/object/apply:os.system ['true']\n",
    "an unknown tag": "actor_config: !mine {model: base}\n",
    "a list as a key": "? [a, b]\n: 1\n",
    "a number as a key": "7: 8\n",
    "a section under a number": "actor_config: {7: 8}\n",
    "a section that is a list": "actor_config: [model, base]\n",
    "a section that is a text": "actor_config: base\n",
    "a date that there is not": "seed: 2001-99-99\n",
    "a number of 5,000 digits": f"seed: {'9' * 5000}\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "a deep list": f"actor_config: {'[' * 5000}{']' * 5000}\n",
    "Windows paths in quotes": 'actor_config:\n  model: "C:\\users\\x"\n',
    "a colon too many": "actor_config: model: base\n",
    "a merge with a number": "actor_config:\n  <<: 7\n  model: base\n",
    "a conflict of git": "<<<<<<< HEAD\nseed: 1\n=======\nseed: 2\n>>>>>>> main\n",
}
SETS = ("nothing", "=1", "a..b=1", ".=1", "seed=[", "seed={", "actor_config=5", "actor_config.model.x=1", "x.y.z=1",
        "seed=!!python/name:os", "actor_config.lr=fast", "trainer_config.betas=[1]", "seed=.nan",
        "seed=1e999")  # fmt: skip


def yaml_cases(draw: random.Random) -> Iterator[Case]:
    for name, text in YAML_TEXTS.items():
        yield Case(f"c.yaml with {name}", "files", written("c.yaml", text), ACTOR, ("c.yaml",))
    for name, text in YAML_TEXTS.items():
        if name in ("a bell", "a null character", "a deep list", "aliases without end", "a number as a key", "a list"):
            words = next(target.words for target in TARGETS if target.path == "peft.yaml")
            yield Case(f"peft.yaml with {name}", "files", written("peft.yaml", text), words, ("peft.yaml",))
    for text in SETS:
        yield Case(
            f"--set {text}",
            "files",
            lambda folder: None,
            (*ACTOR, "--set", text),
            ("--set", text.split("=")[0].split(".")[0]),
        )
    for key in keys():
        value = draw.choice(["{a: {b: [c]}}", "[[{a: 1}]]", "[[[]], {}]"])
        yield Case(f"--set {key}={value}", "files", lambda folder: None, (*ACTOR, "--set", f"{key}={value}"), (key,))


def keys() -> Iterator[str]:
    """Every key of the configuration, by its section."""
    from pydantic import BaseModel

    from chatrlhf.config.schema import Config

    for name, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from (f"{name}.{key}" for key in kind.model_fields)
        else:
            yield name


PATHS = {
    "a null character": "a\0b",
    "5,000 characters": "x" * 5000,
    "a name of 300 characters": "x" * 300,
    "an unknown user's home": "~nobody_at_all/x",
    "below a file": "text.txt/x",
    "a link to itself": "loop",
    "nothing there": "no/such/place",
    "blanks and letters": "nö such  pläce ",
}
NO_FOLDER = {**{name: PATHS[name] for name in PATHS if name not in ("nothing there", "blanks and letters")},
             "a file": "text.txt", "in /proc": "/proc/chatrlhf", "in /sys": "/sys/kernel/chatrlhf"}  # fmt: skip
NO_OPTION = {name: NO_FOLDER[name] for name in NO_FOLDER if name not in ("a null character", "an unknown user's home")}
NO_FILE = {**PATHS, "a folder": "base"}


def option(key: str, value: str) -> tuple[str, ...]:
    return ("--set", f"{key}={json.dumps(value, ensure_ascii=False)}")


def path_cases() -> Iterator[Case]:
    def loops(folder: Path) -> None:
        (folder / "loop").symlink_to("loop")

    for name, value in NO_FOLDER.items():
        yield Case(f"output_dir is {name}", "boundary", loops, (*ACTOR, *option("output_dir", value)), ("output_dir",))
    yield Case(
        "output_dir is the model's folder", "boundary", loops, (*ACTOR, *option("output_dir", "base")), ("output_dir",)
    )
    for key in ("actor_config.train_dataset_path", "actor_config.validation_dataset_path"):
        for name, value in NO_FILE.items():
            yield Case(f"{key} is {name}", "files", loops, (*ACTOR, *option(key, value[:40])), (key, value[:40]))
    for name, value in NO_FILE.items():
        words = (*ACTOR, *option("actor_config.peft_config_path", value), "--set", "actor_config.peft_enable=true")
        yield Case(f"peft_config_path is {name}", "boundary", loops, words, ("peft_config_path", value[:40]))
        words = (*ACTOR, *option("actor_config.template", f"{value}/x.jinja"))
        yield Case(f"template is {name}", "boundary", loops, words, ("template", value[:40]))
    for key in ("actor_config.model", "actor_config.tokenizer_path"):
        for name, value in {**PATHS, "a file": "text.txt", "a folder of data": "."}.items():
            yield Case(f"{key} is {name}", "weights", loops, (*ACTOR, *option(key, value[:40])), (key, value[:40]))
    for name, value in NO_FILE.items():
        if name in ("a null character", "an unknown user's home"):
            continue
        yield Case(f"data stats: {name}", "files", loops, ("data", "stats", value), (value, value[:40]))
        yield Case(
            f"eval: text is {name}",
            "files",
            loops,
            ("eval", "perplexity", value, "--models", "base"),
            (value, value[:40]),
        )
        yield Case(f"configuration is {name}", "files", loops, (value,), (value, value[:40]))
    for name, value in NO_OPTION.items():
        yield Case(f"init: {name}", "boundary", loops, ("init", value), (value[:40],))
        yield Case(f"merge: --output is {name}", "boundary", loops, (*MERGE[:-1], value), (value[:40], "--output"))
        yield Case(f"merge: --model is {name}", "boundary", loops, (*MERGE[:3], value, "--output", "o"), (value[:40],))
        words = (*SCRIPT[:-1], "--output", f"{value}/x.json")
        yield Case(f"script: --output is {name}", "boundary", loops, words, (value[:40],))
        words = ("data", "stats", "a.jsonl", "--picture", f"{value}/x.png")
        yield Case(f"data stats: --picture is {name}", "boundary", loops, words, (value[:40],))
        words = ("eval", "perplexity", "text.txt", "--models", "base", "--contexts", "64", "--json", f"{value}/x.json")
        yield Case(f"eval: --json is {name}", "boundary", loops, words, (value[:40],))


def value_cases() -> Iterator[Case]:
    """Nonsense in each key, by the command line."""
    for key, kind, value in odd_values():
        if isinstance(value, str) and len(value) > 1000:
            continue
        tree = {key.rpartition(".")[2]: value}
        for section in reversed(key.split(".")[:-1]):
            tree = {section: tree}
        text = yaml.safe_dump(tree, allow_unicode=False)
        yield Case(f"{key} is {kind}", "files", written("c.yaml", text), ACTOR, (key, "c.yaml"))


ROWS: dict[str, bytes] = {
    "half a surrogate pair": b'{"user_input": "\\ud800", "completion": "x"}',
    "a number for a text": b'{"user_input": 5, "completion": "x"}',
    "a list for a text": b'{"user_input": ["a"], "completion": "x"}',
    "no completion": b'{"user_input": "a"}',
    "an unknown field": b'{"user_input": "a", "completin": "x"}',
    "a key given twice": b'{"user_input": "a", "user_input": "b", "completion": "x"}',
    "null": b"null",
    "a text": b'"text"',
    "a null byte": b'{"user_input": "a\0", "completion": "x"}',
    "a bracket that is never closed": b'{"user_input": "a", "completion": "x"',
    "a number of 5,000 digits": b'{"user_input": "a", "completion": "x", "score": ' + b"9" * 5000 + b"}",
    "a deep value": b'{"user_input": "a", "completion": ' + b"[" * 5000 + b"]" * 5000 + b"}",
}
SCORES = ('"high"', "true", "[1]", '"nan"', "NaN", "Infinity", "-Infinity", "1e999", "{}")


def row_cases() -> Iterator[Case]:
    """Rows that are wrong behind one that is right."""
    for name, row in ROWS.items():
        first = b'{"user_input": "the cat", "completion": "on the mat"}\n'
        yield Case(f"a.jsonl with {name}", "files", written("a.jsonl", first + row + b"\n"), ACTOR, ("a.jsonl",))
    words = ("c.yaml", "--type", "REWARD")
    for score in SCORES:
        rows = '{"user_input": "a", "completion": "b", "score": 1}\n{"user_input": "a", "completion": "c", "score": '
        damage = written("r.jsonl", f"{rows}{score}}}\n")
        yield Case(f"r.jsonl with score {score}", "files", damage, words, ("r.jsonl",))


FUNCTIONS = {
    "a syntax error": "def score(p, c)\n    return 1\n",
    "tabs and blanks": "def score(p, c):\n\tx = 1\n        return x\n",
    "an error while it is imported": "x = 1 / 0\n",
    "an end while it is imported": "import sys\nsys.exit(0)\n",
    "a module that is not installed": "import no_such_module_at_all\n",
    "a name that its module does not have": "from os import no_such_name\n",
    "nothing of that name": "def other(p, c):\n    return []\n",
    "a number of that name": "score = 5\n",
    "a division by zero": "def score(p, c):\n    return [1 / 0]\n",
    "a missing key": "def score(p, c):\n    return [{}['x']]\n",
    "a missing attribute": "def score(p, c):\n    return c.no_such()\n",
    "an assertion": "def score(p, c):\n    assert not c\n",
    "a missing file": "def score(p, c):\n    return open('no_such_file').read()\n",
    "a call of itself": "def score(p, c):\n    return score(p, c)\n",
    "an end": "def score(p, c):\n    raise SystemExit\n",
    "a class that wants more": "class score:\n    def __init__(self, a, b, c):\n        pass\n",
    "one argument": "def score(p):\n    return [1.0]\n",
    "nothing to return": "def score(p, c):\n    pass\n",
    "a generator that fails": "def score(p, c):\n    yield 1.0\n    raise KeyError('x')\n",
}


def function_cases() -> Iterator[Case]:
    for name, text in FUNCTIONS.items():
        says = ("reward_fn", "rewarding:score")
        yield Case(f"rewarding.py with {name}", "boundary", written("rewarding.py", text), WITH_FUNCTION, says)


# ---------------------------------------------------------------- all of them


def all_cases(whole: bool = False) -> list[Case]:
    """300 cases, of each group some, and the same ones every time; or all that the groups have, and every value."""
    draw = random.Random(SEED)
    groups = [
        (100, file_cases(draw)),
        (45, model_cases()),
        (20, template_cases()),
        (40, record_cases(draw)),
        (45, yaml_cases(draw)),
        (40, path_cases()),
        (10, function_cases()),
    ]
    drawn = [(number, list(group)) for number, group in groups]
    taken = [case for number, group in drawn for case in (group if whole else draw.sample(group, number))]
    return [*taken, *row_cases(), *value_cases()] if whole else taken


SLOW = 20.0  # seconds


def answered(outcome: Outcome, case: Case) -> str:
    """How a case was answered."""
    if outcome.seconds > SLOW:
        return "slow"
    faults = outcome.faults(case)
    if "traceback" in faults:
        return "traceback"
    if outcome.status == 0:
        return "accepted"
    return "another error" if faults else "clear error"


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    render_limits.RENDERING_SECONDS = 0.2
    wanted, answers, start = sys.argv[1:], Counter[str](), time.perf_counter()
    with sound_folder() as sound:
        for case in all_cases(whole=bool(wanted)):
            if wanted and not any(word in case.name for word in wanted):
                continue
            outcome = run(case, sound)
            faults = outcome.faults(case)
            answers[answered(outcome, case)] += 1
            if faults or outcome.seconds > SLOW:
                last = outcome.said.strip().splitlines()[-1:]
                print(f"[{case.owner}] {case.name} ({outcome.seconds:.2f} s): {', '.join(faults)} | {last}", flush=True)
    print(f"{dict(answers)} of {answers.total()}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
