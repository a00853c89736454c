"""From text to ids: separate segments, one EOS, what is trained, and padding that is never trained."""

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing

from chatrlhf.data.collate import IGNORED, Encoder, fitting, pad_right, prompt_batch
from chatrlhf.data.templates import TEMPLATES, Template
from chatrlhf.errors import DataError
from chatrlhf.models.reward_model import RewardScorer

TALK = "the cat\n\nAssistant: sat on\n\nHuman: the mat\n\nAssistant: the hat\n\nHuman: of the cat"
LOSSES = ["completion", "all_turns", "all"]


def encoder(template: str | Template = "hh", bos: bool = False) -> Encoder:
    tokenizer = tiny.tokenizer()
    if bos:
        tokenizer.bos_token = tokenizer.eos_token  # as OPT's and Llama's tokenizers open every text
        opening = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{opening[0]} $A", None, [opening])
    return Encoder(tokenizer, TEMPLATES.get(template, template), max_length=64)


def ids(made: Encoder, text: str) -> list[int]:
    return made.tokenizer(text, add_special_tokens=False)["input_ids"]


def eos(made: Encoder) -> int:
    return made.tokenizer.eos_token_id


def test_segments_are_tokenised_separately():
    # With nothing between them "th" + "e cat" would merge to "the" if they were tokenised as one text.
    made = encoder("raw")
    assert made.prompt("th") + made.completion("e cat") == [*ids(made, "th"), *ids(made, "e cat"), eos(made)]
    assert made.prompt("th") + made.completion("e cat") != made.completion("the cat")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("text", ["the mat", "the mat\n", "", "{user_input} {} }{"])
def test_a_completion_ends_with_exactly_one_eos(template, text):
    made = encoder(template)
    completion = made.completion(text)
    assert completion.count(eos(made)) == 1 and completion[-1] == eos(made)
    assert made.tokenizer.decode(completion[:-1]) == made.template.completion(text)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("text", ["the cat", TALK, "{user_input} {0} }{"])
def test_the_ids_of_a_prompt_are_the_same_for_every_use(template, bos, text):
    made = encoder(template, bos)
    prompt, answer = made.prompt(text), made.completion("sat")
    for loss_on in LOSSES:
        trained, labels = made.labelled(text, "sat", loss_on)
        assert trained == prompt + answer
        assert len(labels) == len(trained)
    scorer = RewardScorer(model=None, encoder=Encoder(made.tokenizer, made.template, max_length=1000))
    assert scorer.encode(text, "sat") == prompt + answer
    rollout = prompt_batch([prompt], [text], pad_id=1)
    assert rollout.input_ids[rollout.attention_mask].tolist() == prompt
    start = [eos(made)] if bos else []
    assert prompt[: len(start)] == start
    assert made.tokenizer.decode(prompt[len(start) :]) == made.template.prompt(text)


def trained_text(made: Encoder, text: str, completion: str, loss_on: str) -> list[str]:
    """The stretches of text that have labels."""
    token_ids, labels = made.labelled(text, completion, loss_on)
    assert all(label in (IGNORED, token) for token, label in zip(token_ids, labels, strict=True))
    runs: list[list[int]] = []
    before = IGNORED
    for label in labels:
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(label)
        before = label
    return [made.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("bos", [False, True])
def test_what_is_trained_in_a_transcript(bos):
    made = encoder("hh", bos)
    end = made.tokenizer.eos_token
    assert trained_text(made, TALK, "is on", "completion") == [f" is on{end}"]
    assert trained_text(made, TALK, "is on", "all_turns") == [" sat on", " the hat", f" is on{end}"]
    assert trained_text(made, TALK, "is on", "all") == [made.template.prompt(TALK) + f" is on{end}"]


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"hh"}))
def test_a_template_without_turns_trains_the_completion_alone(name):
    made = encoder(name)
    assert made.labelled(TALK, "is on", "all_turns") == made.labelled(TALK, "is on", "completion")


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_padding_is_in_no_mask_and_no_loss(pad_is_eos):
    tokenizer = tiny.tokenizer(pad_is_eos=pad_is_eos)
    rows = [[5, 6, 7, tokenizer.eos_token_id], [8, tokenizer.eos_token_id]]
    padded, mask = pad_right(rows, tokenizer.pad_token_id)
    assert padded.tolist() == [rows[0], [*rows[1], tokenizer.pad_token_id, tokenizer.pad_token_id]]
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert padded.dtype == torch.long and mask.dtype == torch.bool


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_sft_collator_keeps_labels_and_ignores_padding(pad_is_eos):
    collators = pytest.importorskip("trl.trainer.sft_trainer", reason="the SFT stage trains with trl")
    tokenizer = tiny.tokenizer(pad_is_eos=pad_is_eos)
    made = Encoder(tokenizer, TEMPLATES["hh"], max_length=64)
    rows = [made.labelled("the cat", text, "completion") for text in ("sat", "sat on the mat on the mat")]
    examples = [{"input_ids": token_ids, "labels": labels} for token_ids, labels in rows]
    batch = collators.DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(examples)
    for i, (token_ids, labels) in enumerate(rows):
        assert batch["input_ids"][i, : len(token_ids)].tolist() == token_ids
        assert batch["labels"][i, : len(labels)].tolist() == labels  # its own EOS included
        assert set(batch["labels"][i, len(labels) :].tolist()) <= {IGNORED}
    assert batch["labels"].shape[1] > len(rows[0][1])  # so there was padding to look at


def test_prompts_are_padded_on_the_left_and_repeated_side_by_side():
    batch = prompt_batch([[5], [6, 7, 8]], ["a", "b"], pad_id=0, samples_per_prompt=2)
    assert batch.input_ids.tolist() == [[0, 0, 5], [0, 0, 5], [6, 7, 8], [6, 7, 8]]
    assert batch.attention_mask.tolist() == [[False, False, True]] * 2 + [[True] * 3] * 2
    assert batch.group_ids.tolist() == [0, 0, 1, 1]
    assert batch.texts == ["a", "a", "b", "b"]


def test_rows_that_do_not_fit_are_dropped_and_counted():
    assert fitting(["a", "b", "c"], [3, 9, 8], 8, "file") == (["a", "c"], 1)
    with pytest.raises(DataError, match=r"file: all 2 rows .*shortest 8 tokens, limit 4.*max_sequence_length"):
        fitting(["a", "b"], [8, 9], 4, "file")
