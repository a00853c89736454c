"""`datasets:` in a configuration, down to the rows of each stage."""

import json

import pytest

from chatrlhf.config import load_config
from chatrlhf.conversation import Prompt
from chatrlhf.data.inputs import corpus, read_inputs
from chatrlhf.data.stage_rows import Demonstration, PlainText, Preference, ScoredCompletion
from chatrlhf.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    def write(name, rows):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")

    write("mine.jsonl", [{"user_input": f"q{i}", "completion": f"a{i}"} for i in range(20)])
    write("alpaca/train.jsonl", [{"instruction": f"do {i}", "input": "", "output": "done"} for i in range(20)])
    write("fanfics/train.jsonl", [{"TEXT": f"{i}abcdefg{i}hijklmn{i}opq"} for i in range(10)])
    write("scored.jsonl", [{"user_input": f"q{i}", "completion": "x", "score": i} for i in range(12)])
    write("pairs.jsonl", [{"user_input": f"p{i}", "chosen": "x", "rejected": "y"} for i in range(12)])
    (tmp_path / "table.csv").write_text("question,answer,points\nWhy?,So.,3\nHow?,Thus.,0.5\n", encoding="utf-8")
    return tmp_path


def inputs(folder, stages, **sections):
    return read_inputs(config(folder, **sections), stages, needs_judgements=True)


def config(folder, **sections):
    made = load_config(sections)
    made._base_dir = folder
    return made


def test_a_mixture_of_three_kinds(folder):
    datasets = [
        {"mine.jsonl": {"val_split": 0.25}},
        {"alpaca": {"source": "alpaca", "fraction": 0.5, "max_val_set": 0}},
        {"name": "fanfics", "source": "fanfics/train.jsonl", "max_chunk_size": 8, "max_val_set": 0},
    ]
    made = inputs(folder, ["ACTOR"], actor_config={"datasets": datasets})
    rows = made.actor.train
    assert sum(isinstance(row, PlainText) for row in rows) == 30
    assert {row.ends for row in rows if isinstance(row, PlainText)} == {True, False}
    talks = [row.prompt.text for row in rows if isinstance(row, Demonstration)]
    assert sum(text.startswith("q") for text in talks) == 15 and sum(text.startswith("do") for text in talks) == 10
    assert len(made.actor.held_out) == 5
    assert made.notes[0] == "ACTOR: 55 rows in training, 5 held out"
    assert made.notes[2].startswith("  alpaca: 10 in training (50.00% of it), 0 held out")
    assert [path.rpartition("/")[2] for path in made.actor.files] == ["mine.jsonl", "train.jsonl", "train.jsonl"]
    assert not made.warnings
    words = corpus(config(folder, actor_config={"datasets": datasets}))
    assert "q3" in words and "do 3" in words and "9abcdefg9hijklmn9opq" in words


def test_the_seed_of_a_mixture_is_its_own(folder):
    def drawn(**keys):
        actor = {"datasets": [{"mine.jsonl": {"fraction": 0.5}}], **{k: v for k, v in keys.items() if k != "seed"}}
        return inputs(folder, ["ACTOR"], actor_config=actor, seed=keys.get("seed", 1)).actor.train

    assert drawn() == drawn(seed=7) != drawn(mixing_seed=1)


def test_an_epoch_that_sees_a_part_is_followed_by_one_that_sees_another(folder):
    def made(**keys):
        datasets = [{"mine.jsonl": {"fraction": 0.5, "max_val_set": 0}}]
        return inputs(folder, ["ACTOR"], actor_config={"datasets": datasets, "epochs": 2, **keys})

    rows = made().actor
    assert len(rows.train) == 20 and rows.epochs.size == 10
    first, second = (set(rows.epochs.of(epoch)) for epoch in (0, 1))
    assert first | second == set(range(20))
    assert "(50.00% of it, another 50.00% in later epochs)" in made().notes[1]
    rows = made(resample=False).actor
    assert len(rows.train) == 10 and set(rows.epochs.of(0)) == set(rows.epochs.of(1)) == set(range(10))


def test_prompts_are_drawn_for_as_many_epochs_as_the_run_has(folder):
    """24 rollouts, 2 of a prompt, of 5 prompts an epoch: the third epoch is begun."""
    trainer = {"datasets": [{"mine.jsonl": {"size": 5, "max_val_set": 0}}], "algorithm": "rloo"}
    trainer |= {"samples_per_prompt": 2, "num_rollouts": 8, "total_episodes": 24}
    rows = inputs(folder, ["RL"], trainer_config=trainer).prompts
    assert len(rows.epochs.rows) == 3 and len(rows.train) == 15
    rows = inputs(folder, ["RL"], trainer_config=trainer | {"resample": False}).prompts
    assert len(rows.epochs.rows) == 1 and len(rows.train) == 5


def test_prompts_and_judgements(folder):
    reward = {"datasets": ["scored.jsonl"]}
    trainer = {"datasets": ["mine.jsonl", {"alpaca": {"source": "alpaca"}}]}
    made = inputs(folder, ["REWARD", "RL"], reward_config=reward, trainer_config=trainer)
    assert len(made.prompts.train) + len(made.prompts.held_out) == 40
    assert all(isinstance(row, Prompt) for row in made.prompts.train)
    assert {type(row) for row in made.reward.train} == {ScoredCompletion}


def test_scores_and_preferences_in_one_mixture(folder):
    both = ["pairs.jsonl", "scored.jsonl"]
    # A score alone is no preference; the first dataset says which it is to be.
    with pytest.raises(DataError, match="nothing of scored.jsonl is left to train on .12 records without use for this"):
        inputs(folder, ["REWARD"], reward_config={"datasets": both})
    made = inputs(folder, ["REWARD"], reward_config={"datasets": ["pairs.jsonl"]})
    assert {type(row) for row in made.reward.train} == {Preference}
    with pytest.raises(DataError, match="nothing of pairs.jsonl is left"):
        inputs(folder, ["REWARD"], reward_config={"datasets": both, "loss": "regression"})


def test_columns_of_a_table(folder):
    columns = {"user_input": "question", "completion": "answer", "score": "points"}
    entry = {"name": "table.csv", "columns": columns}
    made = inputs(folder, ["REWARD"], reward_config={"datasets": [entry]})
    assert set(made.reward.train) == {
        ScoredCompletion(Prompt.of("Why?"), "So.", 3.0),
        ScoredCompletion(Prompt.of("How?"), "Thus.", 0.5),
    }
    with pytest.raises(
        DataError, match="table.csv, row 1 .line 2.: there is no column 'text' .found 'question', 'answer'"
    ):
        inputs(folder, ["ACTOR"], actor_config={"datasets": [{"name": "table.csv", "columns": {"completion": "text"}}]})


def test_a_file_of_held_out_rows_beside_a_mixture(folder):
    actor = {"datasets": ["mine.jsonl"], "validation_dataset_path": "mine.jsonl"}
    made = inputs(folder, ["ACTOR"], actor_config=actor)
    assert len(made.actor.train) == 20 and len(made.actor.held_out) == 20


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "nowhere.jsonl",
            "actor_config.datasets.0.name: file 'nowhere.jsonl' does not exist.*or name one of arlhf, shp",
        ),
        ({"alpaca": {"source": "nowhere"}}, "actor_config.datasets.0.source: file 'nowhere' does not exist"),
        ({"alpaca": {"source": "alpaca", "lang": "en"}}, "datasets.0.lang: the rows of alpaca do not say"),
        ({"alpaca": {"source": "alpaca", "columns": {"a": "b"}}}, "datasets.0.columns: alpaca has columns of its own"),
        ({"mine.jsonl": {"lang": "en"}}, "datasets.0.lang: it goes with a public dataset"),
        ({"pile": {}}, "too large to be read whole; set size, or name a copy as source"),
    ],
)
def test_entries_that_cannot_be_read(folder, entry, message):
    with pytest.raises((ConfigError, DataError), match=message):
        inputs(folder, ["ACTOR"], actor_config={"datasets": [entry]})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"datasets": ["a"], "train_dataset_path": "b"}, "train_dataset_path and datasets both say what is read"),
        ({"datasets": [{"a": {"fractions": 1}}]}, "unknown key 'actor_config.datasets.0.fractions'; did you mean"),
        ({"datasets": [{"a": {"fraction": 0}}]}, "actor_config.datasets.0.fraction: .*greater than 0"),
        ({"datasets": "a"}, "actor_config.datasets: .*list"),
    ],
)
def test_entries_that_say_too_much(section, message):
    with pytest.raises(ConfigError, match=message):
        load_config({"actor_config": section})


def test_a_file_is_split_by_tree_and_by_prompt(tmp_path):
    trees = [
        {"user_input": f"q{i}", "completion": f"a{i}", "provenance": {"group": f"tree {i // 4}"}} for i in range(40)
    ]
    again = [{"user_input": f"r{i % 5}", "completion": f"a{i}"} for i in range(20)]
    text = "".join(json.dumps(row) + "\n" for row in [*trees, *again])
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    made = inputs(tmp_path, ["ACTOR"], actor_config={"train_dataset_path": "rows.jsonl", "validation_fraction": 0.3})

    def groups(rows):
        names = (row.prompt.text for row in rows)
        return {f"tree {int(name[1:]) // 4}" if name.startswith("q") else name for name in names}

    assert len(made.actor.held_out) >= 12 and len(made.actor.train) + len(made.actor.held_out) == 60
    assert not groups(made.actor.train) & groups(made.actor.held_out)


def test_a_mixture_of_a_public_dataset_leaves_out_what_a_download_does(folder):
    start = "\n\nHuman: {}\n\nAssistant:"
    pairs = [(start.format(i) + " yes", start.format(i) + " no") for i in range(12)]
    pairs += [(pairs[0][0], pairs[0][1] + " more"), (start.format("x") + " a", start.format("x") + " a")]
    rows = [json.dumps({"chosen": chosen, "rejected": rejected}) for chosen, rejected in pairs]
    (folder / "hh.jsonl").write_text("\n".join(rows), encoding="utf-8")
    reward = {"datasets": [{"ARLHF": {"source": "hh.jsonl", "max_val_set": 0}}]}
    made = inputs(folder, ["REWARD"], reward_config=reward)
    assert len(made.reward.train) == 12
    assert made.notes[1].endswith("left out: 1 more than 1 of one prompt, 1 replies that are the same")


def test_a_tokenizer_is_made_of_judged_texts_too_and_only_where_one_is_needed(folder):
    reward = {"datasets": ["scored.jsonl"]}
    assert "x" in corpus(config(folder, reward_config=reward))
    assert corpus(config(folder, reward_config=reward, actor_config={"model": "facebook/opt-125m"})) == []


def test_scored_completions_of_one_prompt_are_pairs_where_the_loss_is_one_of_pairs(tmp_path):
    def read(rows, **options):
        path = tmp_path / "scored.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        section = {"train_dataset_path": str(path), "validation_fraction": 0.25, **options}
        made = inputs(tmp_path, ["REWARD"], reward_config=section).reward
        return made.train, made.held_out

    rows = [{"user_input": f"q{i}", "completion": str(score), "score": score} for score in (2, 5, 2) for i in range(12)]
    train, held_out = read(rows, loss="pairwise")
    # Of 2, 5 and 2 two pairs a prompt: the equals are none.
    expected = {Preference(Prompt.of(f"q{i}"), "5", "2") for i in range(12)}
    assert len(train) + len(held_out) == 24 and {*train, *held_out} == expected
    assert len(held_out) == 6 and not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert isinstance(read(rows)[0][0], ScoredCompletion)
    with pytest.raises(ConfigError, match=r"'pairwise' does not fit .*scored.json, where no prompt has two"):
        read(rows[:12], loss="pairwise")
