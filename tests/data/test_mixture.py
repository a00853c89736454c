"""Several datasets as one."""

import json
from collections import Counter

import pytest

from chatrlhf.conversation import Conversation, Prompt, Provenance
from chatrlhf.data import stage_rows
from chatrlhf.data.files import open_rows
from chatrlhf.data.json_row import Row
from chatrlhf.data.mixture import Mixture, MixtureEntry, mix
from chatrlhf.data.records import from_json, to_json
from chatrlhf.data.sources import LeftOut
from chatrlhf.data.stage_rows import Demonstration, PlainText
from chatrlhf.errors import DataError


def rows_of(records) -> list[Row]:
    return [Row(to_json(record), f"row {i}") for i, record in enumerate(records, start=1)]


def plain(row: Row):
    return [from_json(row)]


def talks(name: str, number: int, **options) -> MixtureEntry:
    records = [Conversation(Prompt.of(f"{name} {i}"), completion="yes") for i in range(number)]
    return MixtureEntry(name, rows_of(records), plain, stage_rows.demonstrations, **options)


def texts(name: str, written: list[str], **options) -> MixtureEntry:
    return MixtureEntry(
        name, rows_of(Conversation(text=text) for text in written), plain, stage_rows.demonstrations, **options
    )


def named(rows) -> Counter:
    return Counter(row.prompt.text.split()[0] if isinstance(row, Demonstration) else "text" for row in rows)


def seen(made: Mixture, epoch: int = 0) -> list:
    """The rows of an epoch."""
    return [made.train[i] for i in made.epochs.of(epoch)]


def test_orcas_mixture():
    """llama2-13b-orca-8k's composition at a thousandth: all, all and a quarter; 5, 1 and 1 held out."""
    made = mix(
        [
            talks("orca_chat", 194, held_out_share=0.1, held_out_most=5),
            texts(
                "fanfics", [f"story {i}" for i in range(49)], held_out_share=0.1, held_out_most=1, max_chunk_size=65535
            ),
            texts("red_pajama", [f"page {i}" for i in range(754)], held_out_share=0.1, held_out_most=1, fraction=0.25),
        ],
        seed=0xE1291F1A,
    )
    assert [share.held_out for share in made.shares] == [5, 1, 1]
    assert [share.train for share in made.shares] == [189, 48, 188]
    assert made.lines() == [
        "425 rows in training, 7 held out",
        "  orca_chat: 189 in training (100.00% of it), 5 held out (71.43%)",
        "  fanfics: 48 in training (100.00% of it), 1 held out (14.29%)",
        "  red_pajama: 188 in training (24.97% of it), 1 held out (14.29%)",
    ]
    assert len(made.train) == 425 and len(made.held_out) == 7
    assert named(made.train) == {"orca_chat": 189, "text": 236}


def test_one_seed_is_one_mixture():
    def made(seed: int, backwards: bool = False) -> tuple[list, list]:
        first = talks("a", 40, held_out_share=0.2, fraction=0.5)
        if backwards:
            first = MixtureEntry(
                "a", first.rows[::-1], plain, stage_rows.demonstrations, held_out_share=0.2, fraction=0.5
            )
        mixture = mix([first, talks("b", 30)], seed)
        return seen(mixture), list(mixture.held_out)

    assert made(1) == made(1)
    assert sorted(map(repr, made(1)[0])) != sorted(map(repr, made(2)[0]))
    # What is drawn follows from what the rows say, not from where they stand.
    assert all(sorted(map(repr, x)) == sorted(map(repr, y)) for x, y in zip(made(1), made(1, True), strict=True))
    assert made(1)[0] != sorted(made(1)[0], key=repr)


@pytest.mark.parametrize(("weight", "expected"), [(2.0, {1: 0, 2: 20}), (1.5, {1: 10, 2: 10}), (0.25, {1: 5, 2: 0})])
def test_weights(weight, expected):
    made = mix([talks("a", 20, weight=weight), talks("b", 7)], seed=3)
    counts = Counter(row.prompt.text for row in seen(made))
    assert len(made.train) == len(counts)
    times = Counter(count for text, count in counts.items() if text.startswith("a"))
    assert {1: times[1], 2: times[2]} == expected
    assert sum(count for text, count in counts.items() if text.startswith("b")) == 7


def counts_of(made: Mixture, epochs: int) -> list[Counter]:
    return [Counter(row.prompt.text for row in seen(made, epoch)) for epoch in range(epochs)]


@pytest.mark.parametrize("share", [{"fraction": 0.25}, {"size": 9}, {"weight": 0.25}])
def test_every_epoch_draws_other_rows_until_all_were_seen(share):
    one = talks("a", 40, held_out_share=0.1, **share)
    made = mix([one, talks("b", 7)], 3, draws=lambda rows: 5)
    assert len(made.epochs.rows) == 5 and made.epochs.size == 16
    counts = counts_of(made, 5)
    for count in counts:
        assert sum(text.startswith("a") for text in count) == 9 and set(count.values()) == {1}
        assert sum(text.startswith("b") for text in count) == 7
    drawn = [{text for text in count if text.startswith("a")} for count in counts]
    assert len(set.union(*drawn[:4])) == 36 == len(made.train) - 7  # all of it in four epochs
    assert drawn[4] == drawn[0]
    assert not {row.prompt.text for row in made.held_out} & set.union(*drawn) and len(made.held_out) == 4
    assert made.lines()[1] == (
        "  a: 9 in training (25.00% of it, another 75.00% in later epochs), 4 held out (100.00%)"
    )


def test_what_is_left_over_of_a_dataset_comes_first_in_the_next_epoch():
    """0.4 of ten rows, in five epochs: each row twice."""
    made = mix([talks("a", 10, fraction=0.4)], 3, draws=lambda rows: 5)
    assert all(len(count) == 4 for count in counts_of(made, 5))
    assert set(sum(counts_of(made, 5), Counter()).values()) == {2}


def test_weights_of_rows_that_change():
    made = mix([talks("a", 20, fraction=0.5, weight=2.0)], 3, draws=lambda rows: 2)
    first, second = counts_of(made, 2)
    assert set(first.values()) == set(second.values()) == {2} and not set(first) & set(second)
    # One and a half times: the half is another one.
    first, second = counts_of(mix([talks("a", 20, weight=1.5)], 3, draws=lambda rows: 2), 2)
    assert set((first + second).values()) == {3} and set(first.values()) == {1, 2}


def test_the_first_epoch_is_the_same_however_many_there_are():
    def made(epochs: int) -> Mixture:
        return mix([talks("a", 40, fraction=0.25), talks("b", 7)], 3, draws=lambda rows: epochs)

    assert seen(made(1)) == seen(made(4)) and seen(made(2), 1) == seen(made(4), 1)
    assert sorted(map(repr, seen(made(2)))) != sorted(map(repr, seen(made(2), 1)))
    assert len(made(1).train) == 17 and len(made(2).train) == 27  # no more rows than are seen


def test_one_draw_is_enough_where_every_epoch_sees_the_same():
    made = mix([talks("a", 10), talks("b", 5, weight=2.0)], 3, draws=lambda rows: 4)
    assert len(made.epochs.rows) == 1 and "later" not in "".join(made.lines())


def test_sizes():
    assert named(mix([talks("a", 20, size=3), talks("b", 20, fraction=0.5, size=15)], seed=0).train) == {
        "a": 3,
        "b": 10,
    }


def test_what_says_the_same_is_taken_once():
    twice = [
        Conversation(Prompt.of(f"x {i % 5}"), completion="yes", provenance=Provenance(row=str(i))) for i in range(10)
    ]
    one = MixtureEntry("one", rows_of(twice), plain, stage_rows.demonstrations)
    other = MixtureEntry(
        "other", rows_of([*twice[:2], Conversation(Prompt.of("y"), completion="no")]), plain, stage_rows.demonstrations
    )
    made = mix([one, other], seed=0)
    assert len(made.train) == len(set(made.train)) == 6
    assert [share.repeated for share in made.shares] == [5, 2]
    assert "left out: 5 rows that repeat another" in made.lines()[1]
    assert len(mix([one, other], seed=0, deduplicate=False).train) == 13


@pytest.mark.parametrize("seed", range(5))
def test_nothing_that_is_held_out_is_trained_on(seed):
    """Not even another answer to its prompt, or a record of its tree, from another dataset."""
    records = [
        Conversation(
            Prompt.of(f"question {i // 4}"), completion=f"answer {i}", provenance=Provenance(group=f"tree {i // 8}")
        )
        for i in range(80)
    ]
    trees = MixtureEntry("trees", rows_of(records), plain, stage_rows.demonstrations, held_out_share=0.25)
    again = [replace_answer(record) for record in records[::3]]
    others = MixtureEntry("others", rows_of(again), plain, stage_rows.demonstrations)
    made = mix([trees, others], seed)
    groups = {row.prompt.text: i // 8 for i, row in enumerate(r for x in records for r in stage_rows.demonstrations(x))}
    held, trained = ({groups[row.prompt.text] for row in rows} for rows in (made.held_out, made.train))
    assert len(made.held_out) == 16 and len(held) == 2 and not held & trained
    assert made.shares[1].also_held_out > 0


def replace_answer(record: Conversation) -> Conversation:
    return Conversation(record.prompt, completion="another", provenance=record.provenance)


def test_long_texts_are_cut_into_pieces():
    made = mix([texts("long", ["abcdefgh", "ij"], max_chunk_size=3)], seed=0)
    assert set(made.train) == {
        PlainText("abc", ends=False),
        PlainText("def", ends=False),
        PlainText("gh", ends=True),
        PlainText("ij", ends=True),
    }


def test_pieces_of_a_text_stay_on_one_side():
    story = [Conversation(text=f"{i}" * 30, provenance=Provenance(group=str(i))) for i in range(9)]
    one = MixtureEntry("x", rows_of(story), plain, stage_rows.demonstrations, held_out_share=0.4, max_chunk_size=10)
    made = mix([one], seed=1, deduplicate=False)
    held, trained = ({row.text[0] for row in rows} for rows in (made.held_out, made.train))
    assert held and not held & trained


def test_rows_that_are_left_out_are_counted():
    def convert(row: Row):
        return [LeftOut("odd rows")] if int(row.place.split()[1]) % 2 else [from_json(row)]

    base = talks("a", 10)
    made = mix([MixtureEntry("a", base.rows, convert, stage_rows.demonstrations)], seed=0)
    assert len(made.train) == 5 and made.shares[0].left_out == {"odd rows": 5}
    with pytest.raises(DataError, match=r"nothing of a is left to train on \(10 records without use for this stage\)"):
        mix([MixtureEntry("a", base.rows, plain, stage_rows.preferences)], seed=0)


def test_something_is_always_left_for_training():
    made = mix([talks("a", 3, held_out_share=0.99)], seed=0)
    assert (len(made.held_out), len(made.train)) == (2, 1)


def test_few_rows_of_one_prompt():
    """The advice of SHP's card."""
    records = [Conversation(Prompt.of(f"post {i % 2}"), completion=f"reply {i}") for i in range(10)]
    made = mix([MixtureEntry("shp", rows_of(records), plain, stage_rows.demonstrations, most_per_prompt=3)], seed=0)
    assert sorted(row.completion for row in made.train) == [f"reply {i}" for i in range(6)]
    assert made.shares[0].left_out == {"more than 3 of one prompt": 4}


def test_rows_with_one_key_are_taken_once():
    base = talks("a", 6)
    keyed = MixtureEntry(
        "a", base.rows, plain, stage_rows.demonstrations, key=lambda row: int(row.place.split()[1]) // 2
    )
    made = mix([keyed], seed=0)
    assert len(made.train) == 4 and made.shares[0].repeated == 2


def test_rows_are_read_from_the_file_when_they_are_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"user_input": f"{i:03}", "completion": "yes"}) + "\n" for i in range(50)), "utf-8"
    )
    made = mix([MixtureEntry("file", open_rows(path), plain, stage_rows.demonstrations)], seed=0)
    before = [row.prompt.text for row in made.train]
    assert sorted(before) == [f"{i:03}" for i in range(50)]
    path.write_text(path.read_text("utf-8").replace('"yes"', '"no!"'), "utf-8")
    assert made.train[7] == Demonstration(Prompt.of(before[7]), "no!")
    assert [row.prompt.text for row in made.train[3:6]] == before[3:6]


def test_some_records_lose_their_narrative():
    """Shurale was trained with 5 % of its narratives left out."""
    scenes = [Conversation(Prompt((), narrative=f"scene {i}", reply_name="Bob"), completion="yes") for i in range(2000)]
    made = mix(
        [MixtureEntry("soda", rows_of(scenes), plain, stage_rows.demonstrations, drop_narrative=0.05, loss_on="all")],
        0,
        False,
    )
    without = [row for row in made.train if row.prompt.narrative is None]
    assert 70 <= len(without) <= 130 and len(made.train) == 2000
    assert {row.loss_on for row in made.train} == {"all"}
    assert all(row.prompt.reply_name == "Bob" for row in without)
    assert [row.prompt for row in made.train[:50]] == [row.prompt for row in made.train[:50]]


def test_ranks_share_the_mixture_between_them(monkeypatch):
    """Each process mixes for itself and takes its part of every batch: together they see what one process sees."""
    from chatrlhf.stages import global_batches
    from chatrlhf.stages.row_order import EpochOrder

    def of_rank(world: int, rank: int) -> list[str]:
        monkeypatch.setattr(global_batches, "world_size", lambda: world)
        monkeypatch.setattr(global_batches, "rank", lambda: rank)
        made = mix([talks("a", 40, fraction=0.5), talks("b", 13)], 4, draws=lambda rows: 3)
        batches = global_batches.RankBatches(EpochOrder(made.epochs, batch_size=8, seed=9), micro=2)
        batches.set_epoch(1)
        return [made.train[i].prompt.text for batch in batches for i in batch]

    alone, first, second = of_rank(1, 0), of_rank(2, 0), of_rank(2, 1)
    assert len(alone) == 33 and not set(first) & set(second)
    assert sorted(first + second) == sorted(alone)


@pytest.mark.parametrize(
    ("question", "tree"),
    [
        ("another {}", "{}"),  # of a tree that is held out, wherever in it
        ("question {}", "another {}"),  # the same question, asked elsewhere
    ],
)
def test_what_is_held_out_of_one_dataset_is_not_trained_on_from_another(question, tree):
    def of(dataset: str, question: str, tree: str) -> MixtureEntry:
        records = [
            Conversation(Prompt.of(question.format(i)), dataset, provenance=Provenance(group=tree.format(i)))
            for i in range(20)
        ]
        share = 0.5 if dataset == "first" else 0.0
        return MixtureEntry(dataset, rows_of(records), plain, stage_rows.demonstrations, held_out_share=share)

    made = mix([of("first", "question {}", "{}"), of("second", question, tree)], seed=0)
    held = {row.prompt.text.split()[1] for row in made.held_out}
    trained = {row.prompt.text.split()[1] for row in made.train if row.completion == "second"}
    assert len(held) == 10 and trained == set(map(str, range(20))) - held
    assert made.shares[1].also_held_out == 10


def test_the_seed_draws_what_is_taken():
    def drawn(seed: int) -> set[str]:
        return {row.prompt.text for row in mix([talks("a", 40, fraction=0.5)], seed).train}

    assert drawn(1) == drawn(1) != drawn(2)
