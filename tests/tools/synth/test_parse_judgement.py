"""The number or the letter in a judge's reply, and when there is none."""

import pytest

from chatrlhf.tools.synth.parse_judgement import NoVerdict, read_letter, read_score


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("4", 4),
        (" 3.5\n", 3.5),
        ("0", 0),
        ("4.", 4),
        ("4,5", 4.5),
        ("Score: 4", 4),
        ("**Score:** 2", 2),
        ("Score(0-5): 3", 3),
        ("score (from 0 to 5): 2", 2),
        ("Rating: **2**/5", 2),
        ("4/5", 4),
        ("Score: 4.0/5.0", 4),
        ("I'd give it 4 out of 5 because 2 facts are right", 4),
        ("I would give this reply a 4 because it is short.", 4),
        ("In 2023 it was so. Score: 4", 4),
        ("2 mistakes.\nScore: 3", 3),
        ("4\n\nIt has 3 sentences and is right", 4),
        ("On a scale of 0 to 5, I give 3", 3),
        ("<think>maybe 3 or 4</think>\n5", 5),
        ("The score is 4. So 4 it is.", 4),
        ("Score: 4 (90% sure)", 4),
        ("score of 2.5", 2.5),
        ("5 stars", 5),
    ],
)
def test_a_score_with_words_around_it(reply, score):
    assert read_score(reply, 0, 5) == score


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "no number"),
        ("I'm sorry, but I cannot judge that.", "no number"),
        ("four", "no number"),
        ("NaN", "no number"),
        ("80%", "no number"),
        ("4e2", "no number"),
        ("gpt-4o", "no number"),
        ("3-4", "range"),
        ("Score: 3-4", "range"),
        ("between 3 and 4", "range"),
        ("3 or 4", "range"),
        ("3-4/5", "range"),
        ("1. correct 2. polite", "several numbers"),
        ("Score: 4\nthe other one: Score: 3", "several numbers"),
        ("10", "not on the scale"),
        ("-1", "not on the scale"),
        ("Score: -1", "not on the scale"),
        ("Score: 6", "not on the scale"),
        ("5.01", "not on the scale"),
        ("4/10", "out of 10"),
        ("Score: 4/10", "out of 10"),
        ("<think>perhaps a 3", "still thinking"),
    ],
)
def test_what_holds_no_score_is_never_guessed(reply, reason):
    with pytest.raises(NoVerdict, match=reason):
        read_score(reply, 0, 5)


def test_the_scale_is_the_users():
    assert read_score("Score: 85 (of 100)", 0, 100) == 85
    assert read_score("7/10", 1, 10) == 7
    assert read_score("-1", -1, 1) == -1
    with pytest.raises(NoVerdict, match="not on the scale from 1 to 10"):
        read_score("0", 1, 10)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A", "A"),
        ("B.", "B"),
        ("**A**", "A"),
        ("(B)", "B"),
        ("Better: B", "B"),
        ("Better: Reply A", "A"),
        ("Reply A", "A"),
        ("I prefer A", "A"),
        ("A is better than B", "A"),
        ("The better reply is B, since A is wrong", "B"),
        ("A: clear and short", "A"),
        ("<think>A? B?</think>B", "B"),
    ],
)
def test_a_letter_with_words_around_it(reply, letter):
    assert read_letter(reply) == letter


@pytest.mark.parametrize(
    "reply", ["", "Both", "Neither", "A reply like this is bad", "a", "Reply A is wrong, Reply B is right", "C"]
)
def test_what_names_no_reply_is_no_choice(reply):
    with pytest.raises(NoVerdict):
        read_letter(reply)
