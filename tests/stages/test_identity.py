"""What counts as the same model, tokenizer and function."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
from resuming import base_model

from chatrlhf.stages import identity

NOTES: list[str] = []


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_model(tmp_path_factory.mktemp("base") / "base")


def of_model(folder) -> str | None:
    return identity.of_model(str(folder), None, NOTES.append)


def test_a_copy_is_the_same_model_and_a_card_or_a_date_no_part_of_it(base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "README.md").write_text("another card")
    (copy / "config.json").touch()
    assert of_model(copy) == of_model(base)
    assert identity.of_tokenizer(str(copy)) == identity.of_tokenizer(str(base))


def test_a_byte_of_a_weight_makes_another_model_even_where_size_and_time_stay(base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    path = copy / "model.safetensors"
    state, weights = path.stat(), bytearray(path.read_bytes())
    weights[-1] ^= 1
    path.unlink()  # or the new file would have the inode of what this process has read
    path.write_bytes(bytes(weights))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size and of_model(copy) != of_model(base)
    assert identity.of_tokenizer(str(copy)) == identity.of_tokenizer(str(base))


def test_adapters_have_the_identity_of_their_base_too(base, tmp_path):
    other = base_model(tmp_path / "other", seed=1)
    found = set()
    for place in (base, other):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(place)}))
        found.add(of_model(tmp_path))
    assert len(found) == 2


def test_what_is_neither_here_nor_in_the_hubs_cache_is_not_known():
    assert of_model("missing/nothing") is None and identity.of_tokenizer("missing/nothing") is None


def test_much_to_read_is_said(base, monkeypatch):
    monkeypatch.setattr(identity, "WORTH_A_LINE", 1)
    of_model(base)
    assert NOTES[-1].startswith(f"{base}: hashing 0 GB of weights")


def test_a_function_is_its_module_without_comments_and_layout(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def of(source: str) -> str | None:
        (tmp_path / "made_up_judge.py").write_text(source)
        sys.modules.pop("made_up_judge", None)
        import made_up_judge

        return identity.of_function(made_up_judge.score, "made_up_judge")

    first = of("FACTOR = 2\ndef score(p, c):\n    return [FACTOR] * len(c)\n")
    assert first == of("# twice\nFACTOR = 2\n\n\ndef score(p, c):\n    return [FACTOR]*len(c)  # each\n")
    assert first != of("FACTOR = 3\ndef score(p, c):\n    return [FACTOR] * len(c)\n")


def test_a_function_that_is_handed_over_is_its_own_source():
    class Judge:
        def __call__(self, prompts, completions):
            return [1.0 for _ in completions]

    def score(prompts, completions):
        return [2.0 for _ in completions]

    known = [identity.of_function(each) for each in (Judge(), score, lambda p, c: [3.0 for _ in c])]
    assert None not in known and len(set(known)) == 3
    assert identity.of_function(len) is None
