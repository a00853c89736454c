"""The perplexity ladder: known answers, a slow twin, the same targets from every context."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import bloom, gpt2, llama

from chatrlhf.cli import main
from chatrlhf.errors import DataError
from chatrlhf.models.loading.tokenizer import train_tokenizer
from chatrlhf.tools.evaluate.perplexity import perplexity_curve, window_ends

IDS = torch.randint(0, 24, (200,), generator=torch.Generator().manual_seed(0))


def slow(model, context: int, stride: int, ends: list[int]) -> float:
    """Token by token: what stands before each target in its window, through the whole model."""
    total = 0.0
    for end in ends:
        for target in range(end - stride, end):
            seen = IDS[end - context : target][None]
            with torch.no_grad():
                logprobs = model.eval()(seen).logits[0, -1].double().log_softmax(-1)
            total -= logprobs[IDS[target]].item()
    return math.exp(total / (stride * len(ends)))


@pytest.mark.parametrize("make", [llama, gpt2, bloom], ids=lambda make: make.__name__)
def test_perplexities_are_the_slow_twins(make):
    model, ends = make(), window_ends(len(IDS), 16, 4, 5)
    found = perplexity_curve(model, IDS, [6, 16], 4, ends).perplexity
    for context, value in found.items():
        assert value == pytest.approx(slow(model, context, 4, ends), rel=1e-5)
    assert found[6] != pytest.approx(found[16], rel=1e-3)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = llama()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert perplexity_curve(model, IDS, [8, 32], 4, window_ends(200, 32, 4, 9)).perplexity == pytest.approx(
        {8: 24.0, 32: 24.0}
    )


def test_no_token_is_a_target_twice_and_all_contexts_have_the_same():
    ends = window_ends(1000, 100, 20, 10)
    assert len(ends) == 10 and ends[0] == 100 and ends[-1] == 1000
    assert all(later - earlier >= 20 for earlier, later in zip(ends, ends[1:], strict=False))
    assert window_ends(100, 100, 20, 10) == [100]
    assert window_ends(150, 100, 20, 10) == [100, 120, 140]
    with pytest.raises(DataError, match="99 tokens, too few for a context of 100"):
        window_ends(99, 100, 20, 10)


def test_positions_of_a_table_end_and_those_that_turn_do_not():
    ends = window_ends(200, 100, 4, 3)
    assert perplexity_curve(gpt2(), IDS, [64, 65], 4, ends).perplexity[65] is None
    assert perplexity_curve(gpt2(), IDS, [64, 65], 4, ends).perplexity[64] is not None
    assert perplexity_curve(llama(), IDS, [100], 4, ends).perplexity[100] is not None


@pytest.fixture
def folders(tmp_path):
    text = "the cat sat on the mat. " * 60
    (tmp_path / "text.txt").write_text(text)
    tokenizer = train_tokenizer([text], 280)
    for name, seed in (("first", 0), ("second", 1)):
        llama(seed=seed, vocab=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def test_the_command_sets_models_side_by_side(folders, capsys):
    words = ["eval", "perplexity", str(folders / "text.txt"), "--contexts", "64,128", "--stride", "8", "--windows", "4"]
    models = [str(folders / "first"), str(folders / "second"), f"{folders / 'first'}@linear:2"]
    files = ["--json", str(folders / "out.json"), "--picture", str(folders / "out.png")]
    assert main([*words, "--models", *models, *files]) == 0
    out = capsys.readouterr().out
    assert "the same 32 tokens in every row" in out
    found = json.loads((folders / "out.json").read_text())
    assert [each["positions"] for each in found["models"]] == [64, 64, 128]
    values = [each["perplexity"] for each in found["models"]]
    assert values[0] != values[1] != values[2] != values[0]
    assert all(f"{value['64']:.2f}" in out and f"{value['128']:.2f}" in out for value in values)
    assert f"{values[0]['128']:.2f}*" in out and f"{values[2]['128']:.2f}*" not in out
    assert (folders / "out.png").stat().st_size > 1000


def test_what_cannot_be_compared(folders, capsys):
    text = str(folders / "text.txt")
    train_tokenizer(["other words than those"], 270).save_pretrained(folders / "second")
    models = ["--models", str(folders / "first"), str(folders / "second")]
    assert main(["eval", "perplexity", text, *models, "--contexts", "64"]) == 2
    assert "has another tokenizer" in capsys.readouterr().err
    assert main(["eval", "perplexity", text, *models, "--contexts", "32,64"]) == 2
    assert "has to be more than --stride (32)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "perplexity", text, *models, "--contexts", "64;128"])
