"""`extend_rlhf_dataset.py`: more prompts from a few, without near-duplicates."""

from __future__ import annotations

import hashlib
import json

from generating import save, told, written

from chatrlhf.data.records import read_prompts

FEW = [{"user_input": f"{word} a letter to my landlord about the heating"} for word in ("Write", "Type", "Send me")]


def words(body, before) -> str:
    digest = hashlib.sha256(f"{told(body)}{before}".encode()).hexdigest()
    return " ".join(f"w{letter}" for letter in digest[:8])


def test_prompts_of_the_folder_become_more(serve, command, tmp_path, capsys):
    save(tmp_path / "rlhf_training_data.json", FEW)
    server = serve(words)
    assert command("extend_rlhf_dataset", server, "--num_prompts", 20, "--data_dir", tmp_path) == 0
    path = tmp_path / "rlhf_training_data_extended.json"
    rows = written(path)
    assert rows[:3] == FEW
    assert len(rows) == 23 and len(read_prompts(path)) == 23
    assert all(row["provenance"]["generated_by"] == "judge" for row in rows[3:])
    assert f"trainer_config.examples_path: {path}" in capsys.readouterr().out
    assert written(tmp_path / "rlhf_training_data.json") == FEW
    for body in server.asked:
        assert all(row["user_input"] in told(body) for row in FEW)


def test_near_duplicates_are_left_out_and_others_asked_for(serve, command, tmp_path, capsys):
    save(tmp_path / "rlhf_training_data.json", FEW)
    near = "please write a letter to my landlord about the heating"

    def script(body, before):
        return near if before % 2 == 0 else words(body, before)

    server = serve(script)
    assert command("extend_rlhf_dataset", server, "-n", 10, "-d", tmp_path) == 0
    new = [row["user_input"] for row in written(tmp_path / "rlhf_training_data_extended.json")[3:]]
    assert len(new) == 10 and near not in new
    left_out = len(server.asked) - 10
    assert left_out > 0
    assert f"left out {left_out} near-duplicates" in capsys.readouterr().out


def test_a_model_that_repeats_itself_gives_fewer_and_says_so(serve, command, tmp_path, capsys):
    server = serve(lambda *_: "always this request")
    assert command("extend_rlhf_dataset", server, "-n", 5, "-d", tmp_path) == 1
    assert [row["user_input"] for row in written(tmp_path / "rlhf_training_data.json")] == ["always this request"]
    assert "1 of 5 prompts: the model repeats itself" in capsys.readouterr().out
    assert len(server.asked) == 20


def test_without_prompts_each_is_about_a_topic_and_the_folder_gets_its_file(serve, command, tmp_path):
    templates = save(tmp_path / "t.json", {"rlhf": "The task: {user_input} {0}"})
    topics = tmp_path / "topics.txt"
    topics.write_text("keys\nlamps\n")
    server = serve(words)
    arguments = ("-n", 6, "-d", tmp_path / "new", "--templates", templates, "--topics", topics)
    assert command("extend_rlhf_dataset", server, *arguments) == 0
    assert len(written(tmp_path / "new" / "rlhf_training_data.json")) == 6
    assert all(told(body).startswith("The task: {user_input} {0}\n\nThe subject is: ") for body in server.asked)
    assert {told(body).partition("subject is: ")[2].split(".")[0] for body in server.asked} == {"keys", "lamps"}


def test_the_prompts_of_an_actors_file_will_do(serve, command, tmp_path):
    save(tmp_path / "actor_training_data.json", [{**row, "completion": "a"} for row in FEW])
    assert command("extend_rlhf_dataset", serve(words), "-n", 4, "-d", tmp_path) == 0
    assert written(tmp_path / "rlhf_training_data.json")[:3] == FEW


def test_a_run_that_was_cut_short_goes_on_with_its_own_file(serve, command, tmp_path):
    save(tmp_path / "actor_training_data.json", [{**row, "completion": "a"} for row in FEW])
    server = serve(words)
    arguments = ("extend_rlhf_dataset", server, "-n", 8, "-d", tmp_path)
    assert command(*arguments, "--max-requests", 5, "--concurrency", 1) == 1
    path = tmp_path / "rlhf_training_data.json"
    assert len(written(path)) == 3 + 5
    assert json.loads(path.with_name("rlhf_training_data.meta.json").read_text())["complete"] is False
    assert command(*arguments) == 0
    assert len(written(path)) == 3 + 8
    assert len(server.asked) == 8
    assert command(*arguments) == 2  # finished: it is not made again


def test_two_runs_with_one_seed_make_the_same_file(serve, command, tmp_path):
    many = [{"user_input": " ".join(f"{letter}{i}" for letter in "abcdef")} for i in range(12)]
    save(tmp_path / "rlhf_training_data.json", many)
    made = []
    for number, concurrency in enumerate((1, 7)):
        path = tmp_path / f"{number}.json"
        server = serve(words)
        arguments = ("-n", 12, "-d", tmp_path, "-o", path, "--concurrency", concurrency, "--seed", 3)
        assert command("extend_rlhf_dataset", server, *arguments) == 0
        made.append((path.read_bytes(), sorted(map(told, server.asked))))
    assert made[0] == made[1]
    path = tmp_path / "other.json"
    server = serve(words)
    assert command("extend_rlhf_dataset", server, "-n", 12, "-d", tmp_path, "-o", path, "--seed", 4) == 0
    assert sorted(map(told, server.asked)) != made[0][1]
