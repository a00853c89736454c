"""`chatrlhf data`: what the commands count, find and show, on small files and through the command line."""

import json
import subprocess
import sys
import time

import pytest
import tiny

from chatrlhf import cli
from chatrlhf.conversation import Conversation, Pair, Prompt, Provenance, Ranked, Scored, Turn
from chatrlhf.data import long_rows
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import LeftOut
from chatrlhf.data.templates import FORMATS
from chatrlhf.tools.inspect.cli import marked
from chatrlhf.tools.inspect.statistics import Numbers, count
from chatrlhf.tools.inspect.validation import faults_in


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
        return path

    return write


def encoder(context: int = 64) -> Encoder:
    return Encoder(tiny.tokenizer(), FORMATS["raw"], context)


def numbers(*values: float) -> Numbers:
    made = Numbers()
    for value in values:
        made.add(value)
    return made


A = Prompt.of("the cat")
RECORDS = [
    Conversation(A, completion="sat on the mat", provenance=Provenance(generated_by="a model")),
    Conversation(A, completion="sat on the mat", provenance=Provenance(row="2")),  # says the same
    Conversation(A, scored=(Scored("sat", 0.0), Scored("the mat", 3.0))),
    Conversation(Prompt.of("on"), scored=(Scored("sat", None),)),
    Conversation(Prompt.of("the hat"), ranked=(Ranked("on", 0),), pair=Pair("sat", "mat")),
    Conversation(Prompt((Turn("user", "on"), Turn("assistant", "on"), Turn("user", "sat")))),
    Conversation(text="the cat sat on the mat"),
    LeftOut("empty replies"),
]


def test_what_is_counted():
    made = encoder(context=6)
    s = count([(Row({}, str(i)), record) for i, record in enumerate(RECORDS)], made)
    assert (s.rows, s.records, s.left_out) == (8, 7, {"empty replies": 1})
    assert s.kinds == {
        "a completion": 2,
        "scored completions": 1,
        "completions yet to be scored": 1,
        "ranked completions": 1,
        "a chosen and a rejected completion": 1,
        "a prompt alone": 1,
        "plain text": 1,
    }
    assert (s.repeated_records, s.repeated_prompts) == (1, 2)
    assert s.generated_by == {"a model": 1}
    assert list(s.scores.values) == [0.0, 3.0] and list(s.turns.values) == [1, 1, 1, 1, 1, 3]
    first = len(made.prompt("the cat")) + len(made.completion("a", "sat on the mat"))
    assert s.tokens.values[0] == first and s.prompt_tokens.values[0] == len(made.prompt("the cat"))
    assert s.tokens.values[2] == len(made.prompt("the cat")) + len(made.completion("a", "the mat"))  # the longest
    assert s.tokens.values[-1] == len(made.plain("the cat sat on the mat")[0])
    assert s.too_long == sum(length > 6 for length in s.tokens.values) > 0
    assert len(s.completion_tokens) == 1 + 1 + 2 + 1 + 3


def test_a_row_of_many_records_is_one_row():
    row, other = Row({}, "1"), Row({}, "2")
    s = count([(row, RECORDS[0]), (row, RECORDS[2]), (other, RECORDS[5])], encoder())
    assert (s.rows, s.records) == (2, 3)


def test_summaries_and_histograms():
    made = numbers(1, 2, 2, 4)
    assert made.summary() == pytest.approx(
        {"min": 1, "25%": 1.75, "median": 2, "75%": 2.5, "95%": 3.7, "max": 4, "mean": 2.25, "std": 1.0897247}
    )
    assert made.histogram() == [(0.5, 1.5, 1), (1.5, 2.5, 2), (2.5, 3.5, 0), (3.5, 4.5, 1)]
    fine = numbers(*(i / 10 for i in range(100))).histogram(10)
    assert [n for _, _, n in fine] == [10] * 10 and fine[0][0] == 0 and fine[-1][1] == 9.9
    assert numbers(0.5).histogram(4)[-1][2] + sum(n for _, _, n in numbers(0.5).histogram(4)[:-1]) == 1


# --- check


def test_every_fault_is_found(write):
    path = write(
        [
            {"user_input": "a", "completion": "b"},
            '{"user_input": ',
            {"user_input": 3, "completion": 4, "system": 5},
            [1],
            {"user_input": " ", "completion": ""},
            {"user_input": "a", "chosen": "b", "rejected": "b"},
            {"user_input": "a", "completion": "b", "score": "high"},
            {"text": ""},
            "",
            {"user_input": "fine"},
        ]
    )
    assert [fault.replace(str(path), "F") for fault in faults_in(path)] == [
        "F, row 2, column 16: broken JSON (Expecting value); correct the file",
        "F, row 3, field 'user_input': expected text, got int 3",
        "F, row 3, field 'completion': expected text, got int 4",
        "F, row 4: expected an object with fields, got list [1]",
        "F, row 5, field 'user_input': it is empty",
        "F, row 5: a completion is empty",
        "F, row 6: 'chosen' and 'rejected' are the same",
        "F, row 7, field 'score': expected a number, got str \"high\"",
        "F, row 8, field 'text': it is empty",
    ]


@pytest.mark.parametrize(
    ("stage", "faults"),
    [
        (None, []),
        ("actor", ["row 2: field 'completion' is missing; add it"]),
        (
            "reward",
            [
                "row 1: nothing in it is scored, ranked or preferred",
                "row 2: nothing in it is scored, ranked or preferred",
                "row 4, field 'score': it is null; score the file first: python artifacts/generate_rewards.py FILE",
                "row 5: it is preferred, where earlier rows are scored; keep one shape a file",
                "row 6: it is plain text, which stage reward has no use for",
            ],
        ),
        ("rl", ["row 6: it is plain text, which stage rl has no use for"]),
    ],
)
def test_what_a_stage_needs(write, stage, faults):
    path = write(
        [
            {"user_input": "a", "completion": "b"},
            {"user_input": "a"},
            {"user_input": "a", "completion": "b", "score": 0},
            {"user_input": "a", "completion": "b", "score": None},
            {"user_input": "a", "chosen": "b", "rejected": "c"},
            {"text": "a"},
        ]
    )
    assert [fault.removeprefix(f"{path}, ") for fault in faults_in(path, stage=stage)] == faults


def test_files_with_nothing_to_read(write, tmp_path):
    assert list(faults_in(tmp_path / "none.json"))[0].endswith(
        "the file does not exist; correct the path in the configuration"
    )
    assert list(faults_in(write([], "empty.jsonl"))) == [
        f"{tmp_path / 'empty.jsonl'}: it holds no rows that can be read"
    ]


def test_rows_of_a_public_dataset(write):
    path = write(
        [{"instruction": "Sing.", "output": "La."}, {"instruction": "Sing."}, {"instruction": "", "output": "x"}]
    )
    assert [fault.removeprefix(f"{path}, ") for fault in faults_in(path, "ALPACA")] == [
        "row 2: field 'output' is missing (found 'instruction'); add it; check that this is the dataset you asked for",
        "row 3: left out: empty prompts",
    ]


# --- the command line


def run(capsys, *words) -> tuple[int, str]:
    status = cli.main(["data", *map(str, words)])
    return status, capsys.readouterr().out


def test_stats(write, capsys, tmp_path):
    rows = [{"user_input": f"the cat {i}", "completion": "sat on the mat", "score": i % 3} for i in range(30)]
    path = write([*rows, rows[0]])
    status, out = run(capsys, "stats", path, "--context", 10)
    assert status == 0
    for line in ("31  rows", "31    with scored completions", "1  say what an earlier record says", "scores", "█"):
        assert line in out, out
    pytest.importorskip("matplotlib", reason="the picture is matplotlib's")
    assert run(capsys, "stats", path, "--picture", tmp_path / "p.png")[0] == 0
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["data", "stats", str(path), "--picture", str(tmp_path / "p.nothing")]) == 2


def test_check(write, capsys):
    good, bad = write([{"user_input": "a"}], "good.jsonl"), write([{"user_input": 1}], "bad.jsonl")
    assert run(capsys, "check", good) == (0, f"{good}: no fault found\n")
    status, out = run(capsys, "check", bad)
    assert status == 1 and out.endswith(f"{bad}: 1 faults\n") and "row 1, field 'user_input'" in out


def test_show_marks_what_is_trained(write, capsys):
    turns = [{"role": "user", "text": "the cat"}, {"role": "assistant", "text": "sat"}, {"role": "user", "text": "on?"}]
    path = write([{"turns": turns, "completion": "[bold]the mat[/bold]"}, {"user_input": "x", "completion": "y"}])
    status, out = run(capsys, "show", path, "--template", "hh", "-n", 1)
    assert status == 0
    assert "Assistant: sat<|endoftext|>" in out and "⟦ [bold]the mat[/bold]<|endoftext|>⟧" in out
    assert "row 2" not in out
    _, out = run(capsys, "show", path, "--template", "hh", "--loss-on", "all_turns", "--row", 1, "-n", 1)
    assert "⟦ sat<|endoftext|>⟧" in out
    _, out = run(capsys, "show", path, "--row", 2)
    assert "row 2" in out and "row 1" not in out


def test_what_is_marked_is_what_has_labels():
    made = Encoder(tiny.tokenizer(), FORMATS["hh"], 64)
    from chatrlhf.data.stage_rows import Demonstration

    row = Demonstration(Prompt.of("the cat"), "sat on")
    assert marked(*made.actor_row(row, "completion"), made, in_colour=False).plain == (
        f"\n\nHuman: the cat\n\nAssistant:⟦ sat on{made.tokenizer.eos_token}⟧"
    )
    assert marked(*made.actor_row(row, "all"), made, in_colour=False).plain.startswith("⟦")


@pytest.mark.parametrize("text", ["x" * 150_000, " " * 150_000 + "x"], ids=["a letter", "blanks"])
def test_a_long_row_is_named_and_shown_in_part(write, capsys, monkeypatch, text):
    monkeypatch.setattr(long_rows, "LONG", 100_000)
    path = write([{"user_input": "the cat", "completion": text}])
    for words in (("stats", path), ("show", path)):
        start = time.process_time()
        assert cli.main(["data", *map(str, words)]) == 0
        assert time.process_time() - start < 8  # 15 s and more, where the tokenizer is made of all of it
        out, err = capsys.readouterr()
        assert "row 1: a row of 150,0" in err and len(out) < 100_000
    assert "tokens is not shown" in out


def test_a_public_dataset_by_its_name(write, capsys):
    path = write([{"instruction": "Sing.", "input": "", "output": "La."}] * 3)
    status, out = run(capsys, "stats", path, "--as", "alpaca")
    assert status == 0 and "generated by text-davinci-003" in out
    assert "Human: Sing." in run(capsys, "show", path, "--as", "ALPACA", "-n", 1)[1]


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom chatrlhf.cli import main\n"
        "try:\n    main(['data', 'stats', '--help'])\nexcept SystemExit as end:\n"
        "    print('heavy:', sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)), 'rc:', end.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("heavy: [] rc: 0\n"), done.stdout + done.stderr
