"""README and docs: links and anchors resolve, files exist, commands name what there is, and the README stays short."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from chatrlhf.cli import _parser as run_parser
from chatrlhf.tools.evaluate.cli import _parser as evaluate_parser
from chatrlhf.tools.export.cli import _parser as export_parser
from chatrlhf.tools.inspect.cli import _parser as inspect_parser
from chatrlhf.tools.plan.cli import _parser as plan_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PARSERS = {"data": inspect_parser, "eval": evaluate_parser, "export": export_parser, "plan": plan_parser}
LAUNCHERS = ("torchrun", "accelerate", "deepspeed")


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@cache
def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    bare = [re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in bare}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{path.name}: {target}; there are {sorted(anchors(file))}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_are_named_exist(path):
    """Written as code: `stages/sft.py` is looked for in the root, in the package and in its parts."""
    known = {
        str(file.relative_to(ROOT)) for top in ("chatrlhf", "tests", "benchmarks", "artifacts") for file in files(top)
    }
    for name in re.findall(r"`((?:[\w]+/)*[\w]+\.py)(?:::\w+)?`", prose(path)):
        assert (ROOT / name).exists() or any(file.endswith(f"/{name}") for file in known), f"{path.name}: {name}"


@cache
def files(top: str) -> tuple[Path, ...]:
    return tuple((ROOT / top).rglob("*.py"))


def commands() -> Iterator[tuple[str, str]]:
    for path in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield path.name, line


@pytest.mark.parametrize("page, line", list(commands()), ids=lambda text: text[:60])
def test_commands_are_those_that_there_are(page, line):
    words = shlex.split(line, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
        words = words[1:]
    if words[0] in LAUNCHERS:  # the launcher's own words come before the script
        words = ["python", *words[words.index("main.py") :]]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[1] in targets
    elif words[:2] == ["python", "main.py"] or words[:2] == ["chatrlhf", "init"]:
        if words[1] == "main.py":
            known, rest = run_parser().parse_known_args(words[2:])
            assert not rest and (not known.config or (ROOT / known.config).exists() or known.config == "config.yaml")
    elif words[0] == "chatrlhf":
        PARSERS[words[1]]().parse_args(words[2:])
    elif words[:2] == ["python", "-m"]:
        module = ROOT / words[2].replace(".", "/")
        if words[2] == "pytest":
            assert all((ROOT / word).exists() for word in words[3:] if "/" in word)
            return
        sources = [module.with_suffix(".py"), *module.glob("*.py")]
        assert any(source.exists() for source in sources), words[2]
        options_are_in(words[3:], sources)
    elif words[0] == "python":
        script = ROOT / words[1]
        assert script.exists()
        options_are_in(words[2:], [script, ROOT / "chatrlhf" / "tools" / "synth" / "options.py"])
    elif words[0] == "pip":
        assert "-e" in words or words[1] == "install"
    else:
        assert words[0] in ("vllm", "pytest"), line


def options_are_in(words: list[str], sources: list[Path]) -> None:
    text = "".join(source.read_text(encoding="utf-8") for source in sources if source.exists())
    for word in words:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in text, f"{word} is no option of {sources[0].name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9500


def test_no_banned_word():
    done = subprocess.run(["python3", "tests/lint_words.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
