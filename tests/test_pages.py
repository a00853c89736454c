"""README and docs: links and anchors resolve, files exist, commands are understood, and the README stays short."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import yaml

from chatrlhf import cli
from chatrlhf.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LAUNCHERS = ("torchrun", "accelerate", "deepspeed")
OTHERS = ("vllm", "pip")  # programs of others, whose options are not looked at


def each_page(test: Callable[[Path], None]) -> Callable[[Path], None]:
    return pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)(test)


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


# ----- links, anchors, files


@cache
def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    bare = [re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in bare}


@each_page
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{path.name}: {target}; there are {sorted(anchors(file))}"


@cache
def known_files() -> frozenset[str]:
    tops = ("chatrlhf", "tests", "benchmarks", "artifacts")
    return frozenset(str(file.relative_to(ROOT)) for top in tops for file in (ROOT / top).rglob("*.py"))


@each_page
def test_files_that_are_named_exist(path):
    """Written as code: `stages/sft.py` is looked for in the root, in the package and in its parts."""
    for name in re.findall(r"`((?:[\w]+/)*[\w]+\.py)(?:::\w+)?`", prose(path)):
        exists = (ROOT / name).exists() or any(file.endswith(f"/{name}") for file in known_files())
        assert exists, f"{path.name}: {name}"


def test_the_site_has_every_page():
    """And none that is missing."""
    listed = re.findall(r"^ +- [^:\n]+: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_api_page_names_modules_that_exist():
    for name in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE):
        module = ROOT / name.replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__init__.py").exists(), name


# ----- commands


class Parsed(BaseException):
    """A command's parser has taken all words; nothing of the command runs."""


@pytest.fixture
def parse(monkeypatch, capsys) -> Callable[[Callable[[Sequence[str]], int], list[str]], argparse.Namespace]:
    """Calls a command's `main` up to where its words are parsed."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, args=None, namespace=None):
        raise Parsed(parse_args(parser, args, namespace))

    def call(main: Callable[[Sequence[str]], int], words: list[str]) -> argparse.Namespace:
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            try:
                main(words)
            except Parsed as done:
                return done.args[0]
            except SystemExit:
                raise AssertionError(capsys.readouterr().err) from None
        raise AssertionError("no parser was asked")

    return call


def script(path: Path) -> Callable[[Sequence[str]], int]:
    """`main` of a file that is no module of the package."""
    spec = importlib.util.spec_from_file_location(f"_script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def commands(pattern: str, complete: bool) -> Iterator[tuple[str, str]]:
    """Page and command line, from fenced blocks (whole commands) or from prose (where options may be left out)."""
    for path in PAGES:
        lines = [line for block in blocks(path, "bash") for line in block.replace("\\\n", " ").splitlines()]
        for line in lines if complete else re.findall(r"`([^`\n]+)`", prose(path)):
            if re.match(pattern, line):
                yield path.name, line


WHOLE = list(commands(r"\s*[^#\s]", complete=True))
MENTIONED = list(commands(r"(python|make|pytest|chatrlhf) ", complete=False))


def words_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
        words = words[1:]
    if words[0] in LAUNCHERS:  # the launcher's own words come before the script
        words = ["python", *words[words.index("main.py") :]]
    return words[: words.index(">")] if ">" in words else words


@pytest.mark.parametrize("page, line", WHOLE, ids=lambda text: text[:60])
def test_whole_commands_are_understood(page, line, parse):
    words = words_of(line)
    if words[0] == "chatrlhf":
        parse(cli.main, words[1:])
    elif words[:2] == ["python", "main.py"]:
        config = parse(cli.main, words[2:]).config
        assert (ROOT / config).exists(), f"{page}: {config}"
    elif words[0] == "python" and words[1].startswith("artifacts/"):
        parse(script(ROOT / words[1]), words[2:])
    else:
        what_is_named_exists(words)


@pytest.mark.parametrize("page, line", MENTIONED, ids=lambda text: text[:60])
def test_what_is_mentioned_exists(page, line):
    what_is_named_exists(words_of(line))


def what_is_named_exists(words: list[str]) -> None:
    """Target, module, script or subcommand; and each option stands in the source of a module or script."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), words
    elif words[0] == "pytest" or words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[1:] if "/" in word), words
    elif words[:2] == ["python", "-m"]:
        module = ROOT / words[2].replace(".", "/")
        sources = [source for source in (module.with_suffix(".py"), *module.glob("*.py")) if source.exists()]
        assert sources, words[2]
        options_are_in(words[3:], sources)
    elif words[0] == "python":
        assert (ROOT / words[1]).exists(), words[1]
        options_are_in(words[2:], [ROOT / words[1], Path(cli.__file__)])
    elif words[0] == "chatrlhf":
        assert f'["{words[1]}"]' in Path(cli.__file__).read_text(encoding="utf-8"), words
    else:
        assert words[0] in OTHERS, words


def options_are_in(words: list[str], sources: list[Path]) -> None:
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    for word in words:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in text, f"{word} is no option of {sources[0].name}"


# ----- what else is quoted


@each_page
def test_configurations_load(path, tmp_path):
    """Every YAML block is a configuration, or a part of one, with keys and values that the schema takes."""
    for number, block in enumerate(blocks(path, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        load_config(file)


@each_page
def test_python_compiles(path):
    for block in blocks(path, "python"):
        compile(block, path.name, "exec")


def test_project_files_are_yaml():
    for name in ("CITATION.cff", ".github/workflows/ci.yml", ".pre-commit-config.yaml"):
        assert isinstance(yaml.safe_load((ROOT / name).read_text(encoding="utf-8")), dict), name


def test_ci_calls_targets_of_the_makefile():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    text += (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    called = re.findall(r"(?:run|entry): make ([a-z-]+)$", text, re.MULTILINE)
    assert {"lint", "test", "test-slow", "docs"} <= set(called)
    for target in called:
        what_is_named_exists(["make", target])


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9500


def test_no_banned_word():
    done = subprocess.run([sys.executable, "tests/lint_words.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
