"""Which prompts a step samples."""

import numpy as np

from chatrlhf.data.epochs import Epochs
from chatrlhf.rl.prompt_schedule import PromptSchedule
from chatrlhf.runtime.seeding import step_seed


def schedule(seed: int = 1, samples: int = 1, per_step: int = 2) -> PromptSchedule:
    return PromptSchedule([[10], [11, 11], [12], [13], [14]], list("abcde"), 0, per_step, samples, seed)


def test_every_epoch_visits_each_prompt_once_in_an_order_of_its_own():
    texts = [text for step in range(10) for text in schedule().batch(step).texts]
    epochs = [texts[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == list("abcde") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_step_depends_on_seed_and_step_alone():
    started, resumed = schedule(), schedule()
    for step in range(4):
        started.batch(step)
    assert started.batch(4).texts == resumed.batch(4).texts
    assert [schedule(1).batch(s).texts for s in range(5)] != [schedule(2).batch(s).texts for s in range(5)]


def test_an_epoch_visits_the_prompts_that_are_its_own():
    epochs = Epochs((np.array([0, 2]), np.array([4, 1])))
    made = PromptSchedule([[10], [11, 11], [12], [13], [14]], list("abcde"), 0, 2, 1, 1, epochs)
    assert [sorted(made.batch(step).texts) for step in range(3)] == [["a", "c"], ["b", "e"], ["a", "c"]]


def test_other_prompts_a_step_go_on_behind_the_last_one_seen():
    want = [text for step in range(10) for text in schedule().batch(step).texts]
    before = [text for step in range(2) for text in schedule().batch(step).texts]
    changed = PromptSchedule([[10], [11, 11], [12], [13], [14]], list("abcde"), 0, 3, 1, 1, None, 2, 4)
    after = [text for step in range(2, 6) for text in changed.batch(step).texts]
    assert before + after == want[:16]


def test_samples_of_a_prompt_share_its_group():
    batch = schedule(samples=3).batch(0)
    assert batch.group_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(set(batch.texts[:3])) == len(set(batch.texts[3:])) == 1


def test_prompts_are_padded_on_the_left():
    batch = schedule(per_step=5).batch(0)
    row = batch.texts.index("c")
    assert batch.input_ids[row].tolist() == [0, 12]
    assert batch.attention_mask[row].tolist() == [False, True]


def test_seeds_differ_by_seed_step_and_purpose():
    keys = [(1, 2, "rollout"), (1, 3, "rollout"), (2, 2, "rollout"), (1, 2, "prompts")]
    assert len({step_seed(*key) for key in keys}) == 4
    assert step_seed(1, 23, "x") != step_seed(12, 3, "x")


def test_seeds_are_the_same_in_every_process_and_version():
    # Checkpoints carry a step and no generator, so this number may never change.
    digest = 0xCBF29CE484222325  # FNV-1a of "1/2/rollout", its 64 bits cut to 63
    for byte in b"1/2/rollout":
        digest = (digest ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    assert step_seed(1, 2, "rollout") == digest & 0x7FFFFFFFFFFFFFFF
