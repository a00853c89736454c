"""Public datasets to ChatLLaMA's three files: small copies made here, and the real one where it lies."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chatrlhf.conversation import Prompt
from chatrlhf.data.download import ACTOR, PROMPTS, REWARD, download
from chatrlhf.data.records import read_demonstrations, read_judgements, read_prompts
from chatrlhf.data.sources import shp
from chatrlhf.data.stage_rows import Demonstration, PlainText, Preference
from chatrlhf.data.templates import FORMATS, arguments_of
from chatrlhf.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "artifacts" / "download_dataset.py"
REAL_HH = ROOT.parent / "shared" / "data" / "hh-rlhf"


def transcript(prompt: Prompt, reply: str) -> str:
    """As template `hh` shows it, without the EOS token that closes each reply."""
    return FORMATS["hh"].render(arguments_of(prompt, False), (("eos_token", ""),), True) + " " + reply


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {
        "chosen": f"\n\nHuman: {prompt}\n\nAssistant:{chosen}",
        "rejected": f"\n\nHuman: {prompt}\n\nAssistant:{rejected}",
    }


GOOD = [
    pair("Hi?", " Hello!", " Go away"),
    pair("Tea?\n\nAssistant: Yes. \n\nHuman: With {milk}?", " No,\n\nthank you.", " \tMaybe \n"),
    pair("Is\n\nHuman nature so?", "  Two blanks and é", " Human: no"),
]
BAD = {
    "empty replies": pair("a", " ", " b"),
    "transcripts with unequal numbers of turns": {
        **pair("a", " b", " c"),
        "chosen": pair("a\n\nAssistant: x\n\nHuman: y", " b", "")["chosen"],
    },
    "transcripts that differ before the last reply": {
        **pair("a", " b", " c"),
        "chosen": pair("other", " b", "")["chosen"],
    },
    "turns without a blank behind the colon": pair("a", "b", " c"),
    "replies that are the same": pair("a", " b", " b"),
    "empty prompts": pair("", " b", " c"),
    "more than 1 of one prompt": pair("Hi?", " Hello again!", " Go!"),
    "transcripts that do not go from a human turn to an assistant's reply": pair("a", " b\n\nHuman: c", " d"),
    "texts with half a character (a lone surrogate)": pair("a\ud800", " b", " c"),
}


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


@pytest.fixture
def hh_copy(tmp_path):
    """The hub's layout: good rows, one for each reason to leave a row out, and a subset of another schema."""
    folder = tmp_path / "copy"
    write_jsonl(folder / "harmless-base" / "train.jsonl.gz", [*GOOD, *BAD.values()])
    write_jsonl(folder / "helpful-base" / "test.jsonl.gz", [pair(f"help {i}", " yes", " no") for i in range(20)])
    write_jsonl(folder / "red-team-attempts" / "train.jsonl.gz", [{"transcript": "x"}])
    return folder


def shp_row(post: str, a: str, b: str, label: int = 1) -> dict:
    return {
        "post_id": post[:4],
        "history": post,
        "human_ref_A": a,
        "human_ref_B": b,
        "labels": label,
        "score_ratio": 2.0,
    }


# --- a dataset


def test_the_three_files_hold_the_same_rows(hh_copy, tmp_path):
    result = download("ARLHF", tmp_path / "out", 100, source_dir=hh_copy, subset="harmless-base")
    actor = read_demonstrations(tmp_path / "out" / ACTOR)
    pairs = read_judgements(tmp_path / "out" / REWARD)
    prompts = read_prompts(tmp_path / "out" / PROMPTS)
    assert len(pairs) == len(GOOD)
    assert [(p.prompt, p.chosen) for p in pairs] == [(d.prompt, d.completion) for d in actor]
    assert [p.prompt for p in pairs] == prompts
    rendered = {(transcript(p.prompt, p.chosen), transcript(p.prompt, p.rejected)) for p in pairs}
    kept = {(row["chosen"], row["rejected"]) for row in [*GOOD, BAD["more than 1 of one prompt"]]}
    assert rendered < kept  # of two rows with one prompt the first drawn
    assert result.left_out == dict.fromkeys(BAD, 1)
    report = "\n".join(result.lines())
    assert "asked for 100 rows, 3 were there" in report
    assert "left out 1: empty replies" in report
    assert "actor_config.template: hh" in report


def test_all_subsets_in_turn_and_what_there_is_of_a_missing_split(hh_copy, tmp_path):
    result = download("ARLHF", tmp_path / "out", 6, source_dir=hh_copy)
    prompts = read_prompts(tmp_path / "out" / PROMPTS)
    assert len(prompts) == 6
    assert sum(prompt.text.startswith("help ") for prompt in prompts) >= 3
    assert any("helpful-base has no split 'train'; took test.jsonl.gz" in note for note in result.notes)
    assert any("red-team-attempts" in note for note in result.notes)


def test_the_seed_draws_the_rows(hh_copy, tmp_path):
    def drawn(name, seed):
        download("ARLHF", tmp_path / name, 5, source_dir=hh_copy, subset="helpful-base", split="test", seed=seed)
        return [(tmp_path / name / file).read_bytes() for file in (ACTOR, REWARD, PROMPTS)]

    assert drawn("a", 1) == drawn("b", 1) != drawn("c", 2)


def test_shp_takes_few_pairs_of_a_post(tmp_path):
    rows = [shp_row("One post?", f"good {i % 3}", f"bad {i}") for i in range(9)] + [shp_row("Another?", "x", "y", 0)]
    write_jsonl(tmp_path / "shp" / "askvet" / "train.json", rows)
    result = download("SHP", tmp_path / "out", source_dir=tmp_path / "shp")
    pairs = read_judgements(tmp_path / "out" / REWARD)
    assert sum(p.prompt.text == "One post?" for p in pairs) == shp.PAIRS_PER_POST
    assert Preference(Prompt.of("Another?"), "y", "x") in pairs
    assert result.left_out == {"more than 5 of one prompt": 4}
    assert sorted(p.text for p in read_prompts(tmp_path / "out" / PROMPTS)) == ["Another?", "One post?"]
    actor = read_demonstrations(tmp_path / "out" / ACTOR)
    assert {(d.prompt, d.completion) for d in actor} == {(p.prompt, p.chosen) for p in pairs}
    assert len(actor) == len(set(actor))
    assert "actor_config.template: chatllama" in "\n".join(result.lines())


def test_existing_files_are_not_overwritten(hh_copy, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / REWARD).write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match=rf"refused to overwrite .*{REWARD}; give another --path, or --force"):
        download("ARLHF", out, source_dir=hh_copy)
    assert [file.name for file in out.iterdir()] == [REWARD]
    assert (out / REWARD).read_text(encoding="utf-8") == "mine"
    download("ARLHF", out, source_dir=hh_copy, force=True)
    assert sorted(file.name for file in out.iterdir()) == sorted([ACTOR, REWARD, PROMPTS])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset": "nowhere"}, "no such subset .*found harmless-base, helpful-base, red-team-attempts"),
        (
            {"subset": "red-team-attempts"},
            r"train.jsonl.gz, row 1: field 'chosen' is missing .found 'transcript'.*check that this is the dataset",
        ),
        ({"number_of_samples": 0}, "number_of_samples: 0 is too few"),
        ({"source_dir": Path("nowhere")}, "--source nowhere: there is no such file or folder"),
        ({"source_dir": None, "subset": "nowhere"}, "has no 'nowhere'; choose one of harmless-base, "),
        ({"source_dir": None, "split": "validation"}, "has no 'validation'; choose one of train, test"),
    ],
)
def test_errors_say_what_to_change(hh_copy, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        download("ARLHF", tmp_path / "out", **{"source_dir": hh_copy} | options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"chosen": "a"}\n{"chosen": ', mtime=0), r"test.jsonl.gz, row 2, column \d+: broken JSON"),
        (gzip.compress(b"[1]", mtime=0), "test.jsonl.gz, row 1: expected an object"),
        (b"no gzip", "test.jsonl.gz: it cannot be read"),
        (gzip.compress(b"{}" * 1000, mtime=0)[:20], "test.jsonl.gz: it cannot be read"),
        (gzip.compress(b"", mtime=0), "no usable row was found .there are no rows"),
        (
            gzip.compress(json.dumps(BAD["empty replies"]).encode(), mtime=0),
            "no usable row was found .1 empty replies",
        ),
    ],
)
def test_damaged_copies(tmp_path, content, message):
    file = tmp_path / "copy" / "harmless-base" / "test.jsonl.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        download("ARLHF", tmp_path / "out", source_dir=tmp_path / "copy", split="test")


def test_from_the_hub(hh_copy, tmp_path, monkeypatch):
    """The hub's client reads the small copy in place of the hub; everything else is as it is there."""
    import datasets

    asked = []
    original = datasets.load_dataset

    def local(name, **options):
        asked.append((name, options["data_dir"], options["split"], options["streaming"]))
        return original(str(hh_copy), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    for name in ("a", "b"):
        download("ARLHF", tmp_path / name, 5, subset="helpful-base", split="test", seed=3)
    assert asked == [("Anthropic/hh-rlhf", "helpful-base", "test", True)] * 2
    pairs = read_judgements(tmp_path / "a" / REWARD)
    assert len(pairs) == 5 and all(p.prompt.text.startswith("help ") and p.chosen == "yes" for p in pairs)
    assert (tmp_path / "a" / REWARD).read_bytes() == (tmp_path / "b" / REWARD).read_bytes()
    # Of the four subsets a run without --subset asks for, this copy lacks two.
    with pytest.raises(DataError, match=r"Anthropic/hh-rlhf, .*: it could not be read from the hub .*--source"):
        download("ARLHF", tmp_path / "c", 50)
    assert not (tmp_path / "c").exists()


@pytest.mark.skipif(not REAL_HH.exists(), reason=f"no copy of Anthropic/hh-rlhf at {REAL_HH}")
def test_the_real_transcripts_come_back_byte_for_byte(tmp_path):
    result = download("ARLHF", tmp_path, 10**6, source_dir=REAL_HH, subset="harmless-base")
    with gzip.open(REAL_HH / "harmless-base" / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        originals = {(row["chosen"], row["rejected"]) for row in map(json.loads, file)}
    pairs = read_judgements(tmp_path / REWARD)
    rendered = {tuple(transcript(p.prompt, reply) for reply in (p.chosen, p.rejected)) for p in pairs}
    # Numbers are compared, not rows: a failure must not print them.
    changed = len(rendered - originals)
    assert changed == 0
    assert len(rendered) == len(pairs) > 0.99 * len(originals)
    assert len(pairs) + sum(result.left_out.values()) == 1500


@pytest.fixture
def trees(tmp_path):
    def message(text, role, replies=(), rank=None):
        return {"text": text, "role": role, "lang": "en", "rank": rank, "deleted": False, "replies": list(replies)}

    answers = [
        message("Good.", "assistant", [message("Thanks. And?", "prompter")], 0),
        message("Bad.", "assistant", (), 1),
    ]
    rows = [
        {"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": message("Why?", "prompter", answers)},
        {
            "message_tree_id": "2",
            "tree_state": "ready_for_export",
            "prompt": message("Was?", "prompter") | {"lang": "de"},
        },
    ]
    write_jsonl(tmp_path / "trees" / "trees.jsonl.gz", rows)
    return tmp_path / "trees"


def test_a_dataset_of_trees_in_one_language(trees, tmp_path):
    result = download("OASST1", tmp_path / "out", 9, source_dir=trees, lang="en")
    why = Prompt.of("Why?")
    actor = read_demonstrations(tmp_path / "out" / ACTOR)
    assert actor == [Demonstration(why, "Good."), Demonstration(why, "Bad.")]  # the best first
    assert read_judgements(tmp_path / "out" / REWARD) == [Preference(why, "Good.", "Bad.")]
    assert [p.text for p in read_prompts(tmp_path / "out" / PROMPTS)] == [
        "Why?",
        "Human: Why?\n\nAssistant: Good.\n\nHuman: Thanks. And?",
    ]
    assert result.left_out == {"rows in another language": 1} and result.taken == 1
    rows = json.loads((tmp_path / "out" / ACTOR).read_text(encoding="utf-8"))
    assert rows[0]["provenance"] == {"dataset": "OpenAssistant/oasst1", "licence": "Apache-2.0", "group": "1"}
    with pytest.raises(DataError, match="--lang: the rows of Anthropic/hh-rlhf do not say which language"):
        download("ARLHF", tmp_path / "x", source_dir=trees, lang="en")
    with pytest.raises(DataError, match="--subset: OpenAssistant/oasst1 has none"):
        download("OASST1", tmp_path / "x", source_dir=trees, subset="trees")


def test_what_a_dataset_has_nothing_for_is_not_written(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "One."}, {"text": " "}, {"text": "Two."}])
    result = download("RED_PAJAMA", tmp_path / "out", source_dir=tmp_path / "train.jsonl")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [ACTOR]
    assert set(read_demonstrations(tmp_path / "out" / ACTOR)) == {PlainText("One."), PlainText("Two.")}
    report = "\n".join(result.lines())
    assert "left out 1: empty texts" in report and "no rows for the reward model" in report
    assert "examples_path" not in report


# --- the script


def run_script(*words: str) -> subprocess.CompletedProcess:
    # From another folder and without PYTHONPATH: it finds the package beside itself.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, env=environment, cwd="/"
    )


def test_the_script_prints_what_to_do_next(hh_copy, tmp_path):
    done = run_script("arlhf", "-p", str(tmp_path / "out"), "-n", "2", "--source", str(hh_copy))
    assert done.returncode == 0, done.stderr
    assert f"trainer_config.examples_path: {tmp_path / 'out' / PROMPTS}" in done.stdout
    again = run_script("ARLHF", "--path", str(tmp_path / "out"), "--source", str(hh_copy))
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr.startswith("error: refused to overwrite") and again.stderr.count("\n") == 1


def test_the_script_lists_the_datasets():
    done = run_script("--list")
    assert done.returncode == 0, done.stderr
    assert "OASST1 " in done.stdout and "allenai/soda" in done.stdout and "CC-BY-4.0" in done.stdout
    assert run_script().returncode == 2


def test_help_needs_neither_torch_nor_datasets():
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(SCRIPT)!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    heavy = sorted({'torch', 'datasets', 'transformers'} & set(sys.modules))\n"
        "    print('heavy:', heavy, 'rc:', end.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--number_of_samples" in done.stdout
    assert done.stdout.endswith("heavy: [] rc: 0\n"), done.stdout + done.stderr


def test_scripts_stay_short():
    for script in (ROOT / "artifacts").glob("*.py"):
        assert len(script.read_text(encoding="utf-8").splitlines()) < 60, script
