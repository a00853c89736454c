"""Near-duplicates by ROUGE-L, against a slow twin."""

import random

import pytest

from chatrlhf.tools.synth.rouge import Texts, longest_common, words_of


def slow_longest_common(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_the_longest_common_subsequence_is_the_textbooks():
    chance = random.Random(0)
    for _ in range(300):
        first, second = ([chance.choice("abcde") for _ in range(chance.randrange(20))] for _ in range(2))
        assert longest_common(first, second) == slow_longest_common(first, second)


def test_texts_that_are_nearly_known_are_not_taken():
    texts = Texts()
    assert texts.take("How do I bake a loaf of bread at home?")
    assert not texts.take("How do I bake a loaf of bread at home?")
    assert not texts.take("how do I bake a loaf of good bread, at home")  # 9 of 10 and 9 words: 0.95
    assert texts.take("Where can I buy bread?")
    assert texts.take("...")
    assert texts.take("?")
    assert not texts.take("... ")


def test_a_text_is_near_from_seven_tenths():
    # ROUGE-L of ten words with ten others, k of them in common and in order, is k / 10.
    for common, is_new in ((6, True), (7, False)):
        texts = Texts()
        assert texts.take(" ".join(f"a{i}" for i in range(10)))
        changed = [f"a{i}" if i < common else f"b{i}" for i in range(10)]
        assert texts.take(" ".join(changed)) is is_new


def test_the_order_of_words_counts():
    texts = Texts()
    assert texts.take("the dog bites the man in the park")
    assert texts.take("park the in man the bites dog the")


def test_scripts_without_blanks_are_compared_by_character():
    assert words_of("面包怎么做?") == ["面", "包", "怎", "么", "做"]
    texts = Texts()
    assert texts.take("请告诉我面包应该怎么做")
    assert not texts.take("请告诉我面包应该怎样做")
    assert texts.take("明天的天气怎么样")


@pytest.mark.parametrize("near", [0.5, 0.9])
def test_how_near_is_the_callers(near):
    texts = Texts(near)
    assert texts.take("one two three four")
    assert texts.take("one two three five") is (near > 0.75)
