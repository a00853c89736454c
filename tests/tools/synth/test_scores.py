"""`generate_rewards.py`: what is judged, what stays, what is put aside, and what comes of pairs."""

from __future__ import annotations

import hashlib
import json

import pytest
from generating import save, told, written
from standins.chat_server import Answer

from chatrlhf.data.records import read_judgements
from chatrlhf.tools.synth.judge import Calibration


def number_of(text: str) -> int:
    """A score that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 6


def by_text(body, before):
    return f"Score: {number_of(told(body))}"


def reply_of(body) -> str:
    return told(body).partition("Reply:\n")[2].partition("\n\nAnswer with")[0]


def test_only_rows_without_a_score_are_judged_and_the_file_is_left_alone(serve, command, tmp_path):
    rows = [
        {"user_input": "a", "completion": "x", "score": None, "id": 7},
        {"user_input": "b", "completion": "y", "score": 0},
        {"user_input": "c", "completion": "z"},
        {"user_input": "d", "completion": "w", "score": 4.5},
        {"user_input": "e", "scored": [{"completion": "1", "score": 0}, {"completion": "2", "score": None}]},
    ]
    path = save(tmp_path / "reward_training_data.json", rows)
    before = path.read_bytes()
    server = serve(lambda body, before: f"Score: {ord(reply_of(body)) % 6}")
    assert command("generate_rewards", server, path) == 0
    assert path.read_bytes() == before
    judged = {"provenance": {"judged_by": "judge"}}
    scored = tmp_path / "reward_training_data_scored.json"
    assert written(scored) == [
        {"user_input": "a", "completion": "x", "score": ord("x") % 6, "id": 7, **judged},
        rows[1],
        {"user_input": "c", "completion": "z", "score": ord("z") % 6, **judged},
        rows[3],
        {"user_input": "e", "scored": [{"completion": "1", "score": 0}, {"completion": "2", "score": 2}], **judged},
    ]
    assert sorted(map(reply_of, server.asked)) == ["2", "x", "z"]
    assert len(read_judgements(scored)) == 6  # training reads it


def test_the_template_is_filled_literally(serve, command, tmp_path):
    awkward = ["{completion}", "{0.__class__}", "{user_input}", "{{ 7 * 7 }}", "{% raw %}", "\\1"]
    path = save(tmp_path / "r.json", [{"user_input": a, "completion": a[::-1], "score": None} for a in awkward])
    templates = save(tmp_path / "t.json", {"reward": "Q {user_input} A {completion} S"})
    server = serve(by_text)
    assert command("generate_rewards", server, path, "-r", templates) == 0
    assert sorted(map(told, server.asked)) == sorted(f"Q {a} A {a[::-1]} S" for a in awkward)


def test_rules_alone_are_a_template(serve, command, tmp_path):
    path = save(tmp_path / "r.json", [{"user_input": "a question", "completion": "an answer", "score": None}])
    server = serve(by_text)
    assert command("generate_rewards", server, path, "-r", save(tmp_path / "t.json", {"reward": "1. Be {kind}"})) == 0
    assert told(server.asked[0]).startswith("1. Be {kind}\n\nRequest:\na question\n\nReply:\nan answer\n\n")


def test_pairs_become_two_scored_rows_in_a_new_file_whose_path_is_printed(serve, command, tmp_path, capsys):
    path = save(
        tmp_path / "pairs.json",
        [
            {"user_input": "a", "chosen": "good", "rejected": "bad"},
            {"user_input": "b", "ranked": [{"completion": "good", "rank": 0}, {"completion": "bad", "rank": 1}]},
        ],
    )
    server = serve(lambda body, before: "5" if reply_of(body) == "good" else "1")
    assert command("generate_rewards", server, path) == 0
    scored = tmp_path / "pairs_scored.json"
    judged = {"provenance": {"judged_by": "judge"}}
    assert written(scored) == [
        {"user_input": prompt, "completion": completion, "score": score, **judged}
        for prompt in "ab"
        for completion, score in (("good", 5.0), ("bad", 1.0))
    ]
    out = capsys.readouterr().out
    assert f"reward_config.train_dataset_path: {scored}" in out
    assert "the judge puts 1 of 1 chosen replies above the rejected one, 0 level with it, 0 below" in out


def test_a_reply_without_a_number_is_put_aside_with_its_reason(serve, command, tmp_path):
    replies = {"x": "I'm sorry, I can't judge this.", "y": "between 3 and 4", "z": "7", "w": "I give it a 2."}
    path = save(tmp_path / "r.json", [{"user_input": "a", "completion": c, "score": None} for c in replies])
    server = serve(lambda body, before: replies[reply_of(body)])
    assert command("generate_rewards", server, path) == 0
    assert [(row["completion"], row["score"]) for row in written(tmp_path / "r_scored.json")] == [("w", 2.0)]
    aside = written(tmp_path / "r_scored.quarantine.jsonl")
    assert [(each["row"], each["completion"], each["replies"]) for each in aside] == [
        (i, completion, [replies[completion]]) for i, completion in enumerate("xyz", start=1)
    ]
    for each, reason in zip(aside, ("no number", "range", "not on the scale"), strict=True):
        assert reason in each["reason"]
    meta = json.loads((tmp_path / "r_scored.meta.json").read_text())
    assert (meta["complete"], meta["rows"], meta["quarantined"]) == (True, 1, 3)


def test_a_refusal_is_put_aside(serve, command, tmp_path):
    path = save(tmp_path / "r.json", [{"user_input": "a", "completion": c, "score": None} for c in "xy"])
    server = serve(lambda body, before: Answer(None, refusal="not that") if reply_of(body) == "x" else "3")
    assert command("generate_rewards", server, path) == 0
    assert [row["completion"] for row in written(tmp_path / "r_scored.json")] == ["y"]
    assert "declined (not that)" in written(tmp_path / "r_scored.quarantine.jsonl")[0]["reason"]


def test_several_judgements_of_a_row(serve, command, tmp_path, capsys):
    path = save(tmp_path / "r.json", [{"user_input": "a", "completion": "x", "score": None}])
    server = serve(lambda body, before: ["Score: 1", "no idea", "Score: 4"][before])
    assert command("generate_rewards", server, path, "--judgements", 3, "--temperature", 0.7) == 0
    (row,) = written(tmp_path / "r_scored.json")
    assert (row["score"], row["score_std"], sorted(row["judgements"])) == (2.5, 1.5, [1.0, 4.0])
    assert "1 further judgements hold no number" in capsys.readouterr().out
    assert command("generate_rewards", server, path, "--judgements", 3, "--temperature", 0, "--force") == 2


def test_the_scale_is_an_option(serve, command, tmp_path):
    path = save(tmp_path / "r.json", [{"user_input": "a", "completion": "x", "score": None}])
    assert command("generate_rewards", serve(lambda *_: "8"), path, "--scale", 1, 10) == 0
    assert written(tmp_path / "r_scored.json")[0]["score"] == 8.0


def test_calibration_compares_the_judge_with_people_and_changes_nothing(serve, command, tmp_path, capsys):
    rows = [{"user_input": "a", "completion": str(i), "score": float(i)} for i in range(5)]
    rows += [{"user_input": "b", "completion": "9", "score": 3.0, "provenance": {"judged_by": "another"}}]
    path = save(tmp_path / "r.json", [*rows, {"user_input": "a", "completion": "0 ", "score": None}])
    server = serve(lambda body, before: f"{int(reply_of(body)) / 2 + 1}")
    assert command("generate_rewards", server, path, "--calibrate") == 0
    assert written(tmp_path / "r_scored.json")[:6] == rows
    out = capsys.readouterr().out
    # 0..4 against 1, 1.5, .. 3: a line; the differences are 1, 0.5, 0, 0.5 and 1.
    assert "calibration on 5 rows with a human score: correlation 1.00 (Pearson), 1.00 (Spearman)" in out
    assert "differ by 0.60" in out
    assert json.loads((tmp_path / "r_scored.meta.json").read_text())["calibration"]["pearson"] == 1.0
    assert len(server.asked) == 6


def test_calibration_by_hand():
    # Ranks of (1, 2, 2, 4): 0, 1.5, 1.5, 3; of (3, 1, 2, 2): 3, 0, 1.5, 1.5. Deviations -1.5 0 0 1.5 and 1.5 -1.5 0 0:
    # covariance -2.25, variances 4.5 and 4.5.
    measured = Calibration((1.0, 2.0, 2.0, 4.0), (3.0, 1.0, 2.0, 2.0))
    assert measured.rank_correlation == pytest.approx(-0.5)
    # Means 2.25 and 2; products -1.25*1 + -0.25*-1 + 0 + 0 = -1; squares 4.75 and 2.
    assert measured.correlation == pytest.approx(-1 / (4.75 * 2) ** 0.5)
    assert measured.difference == pytest.approx((2 + 1 + 0 + 2) / 4)
    assert "no correlation" in Calibration((1.0, 1.0), (1.0, 2.0)).line()


def test_pairwise_judging_swaps_the_orders(serve, command, tmp_path, capsys):
    rows = [{"user_input": "a", "completion": c, "score": None} for c in ("good", "bad")]
    rows += [{"user_input": "b", "completion": c} for c in ("one", "two")]
    rows += [{"user_input": "c", "completion": "alone", "score": None}]
    rows += [{"user_input": "d", "completion": "3", "score": 3}, {"user_input": "d", "completion": "1", "score": 1}]
    rows += [{"user_input": "e", "chosen": "good", "rejected": "bad"}]
    path = save(tmp_path / "r.json", rows)

    def script(body, before):
        if "Request:\na\n" in told(body):
            return "A" if "Reply A:\ngood" in told(body) else "Better: B"
        return "A"  # whatever stands first

    server = serve(script)
    assert command("generate_rewards", server, path, "--pairs") == 0
    judged = {"provenance": {"judged_by": "judge"}}
    assert written(tmp_path / "r_pairs.json") == [
        {"user_input": "e", "chosen": "good", "rejected": "bad"},
        {"user_input": "d", "chosen": "3", "rejected": "1"},
        {"user_input": "a", "chosen": "good", "rejected": "bad", **judged},
    ]
    assert len(server.asked) == 4
    (aside,) = written(tmp_path / "r_pairs.quarantine.jsonl")
    assert aside["reason"] == "the judge prefers neither: the two orders contradict each other"
    assert aside["completions"] == ["one", "two"]
    assert len(read_judgements(tmp_path / "r_pairs.json")) == 3
    assert command("generate_rewards", server, path, "--pairs", "--calibrate", "--force") == 0
    out = capsys.readouterr().out
    # Of the two given pairs the judge, who takes what stands first, prefers neither.
    assert "calibration on 2 pairs that people have judged: the judge agrees on 0, differs on 0" in out


def test_new_scored_rows_from_a_few(serve, command, tmp_path):
    rows = [{"user_input": f"how do I do number {i}?", "completion": f"like {i}", "score": float(i)} for i in range(4)]
    path = save(tmp_path / "r.json", rows)

    def script(body, before):
        text = told(body)
        if "Write one more" in text:
            return f"Tell me of {' '.join(hashlib.sha256(text.encode()).hexdigest()[:8])}."
        if "Now write a reply" in text:
            assert text.count("Score: ") == 4 and "like 3" in text
            return f"A reply that is worth {text.partition('would be scored ')[2].split()[0]}."
        return reply_of(body).rpartition("worth ")[2].rstrip(".")

    server = serve(script)
    assert command("generate_rewards", server, path, "--augment", 12) == 0
    made = written(tmp_path / "r_scored.json")
    assert made[:4] == rows
    new = made[4:]
    assert len(new) == 12 and len({row["user_input"] for row in new}) == 12
    assert all(row["completion"] == f"A reply that is worth {row['score']:g}." for row in new)
    assert len({row["score"] for row in new}) > 2
    source = {"licence": "terms of judge", "generated_by": "judge", "judged_by": "judge"}
    assert all(row["provenance"] == source for row in new)
    assert len(read_judgements(tmp_path / "r_scored.json")) == 16


def test_a_model_that_repeats_itself_augments_less_and_says_so(serve, command, tmp_path, capsys):
    rows = [{"user_input": f"how do I do number {i}?", "completion": f"like {i}", "score": float(i)} for i in range(4)]
    path = save(tmp_path / "r.json", rows)
    server = serve(lambda body, before: "3" if "Score:" in told(body)[-10:] else "always the same request")
    assert command("generate_rewards", server, path, "--augment", 5) == 1
    assert len(written(tmp_path / "r_scored.json")) == 5
    assert "1 of 5 prompts: the model repeats itself" in capsys.readouterr().out


def test_too_few_to_augment_and_nothing_to_do(serve, command, tmp_path, capsys):
    path = save(tmp_path / "r.json", [{"user_input": "a", "completion": "x", "score": 1.0}])
    server = serve(by_text)
    assert command("generate_rewards", server, path) == 2
    assert "nothing to do: 1 completions have a score" in capsys.readouterr().err
    assert command("generate_rewards", server, path, "--augment", 5) == 2
    assert "of which there are 1" in capsys.readouterr().err
    assert command("generate_rewards", server, path, "--pairs") == 2
    assert "no prompt has two completions" in capsys.readouterr().err
    assert not server.asked


def test_rows_that_hold_no_completion_are_named(serve, command, tmp_path, capsys):
    path = save(tmp_path / "r.json", [{"user_input": "a"}, {"user_input": "b", "completion": "x", "score": None}])
    assert command("generate_rewards", serve(lambda *_: "1"), path) == 0
    assert f"left out 1 rows without a completion (the first: {path}, row 1)" in capsys.readouterr().out
    assert len(written(tmp_path / "r_scored.json")) == 1


@pytest.mark.parametrize("row", [{"user_input": "a", "completion": "x", "score": "high"}, {"completion": "x"}])
def test_a_broken_row_is_found_before_anything_is_asked(serve, command, tmp_path, capsys, row):
    path = save(tmp_path / "r.json", [{"user_input": "a", "completion": "x", "score": None}, row])
    server = serve(by_text)
    assert command("generate_rewards", server, path) == 2
    assert "row 2" in capsys.readouterr().err
    assert not server.asked
