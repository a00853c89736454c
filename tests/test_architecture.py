"""Imports go down only, heavy packages stay behind the functions that need them, and `--help` is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "chatrlhf"

# From the ground up; a module imports from its own row or from rows below it.
LEVELS = [
    ("errors", "arguments", "boundary", "conversation", "types", "functional", "config"),
    ("device", "distributed", "heap", "lanes", "optimizer", "progress", "data", "models", "samples", "sharding"),
    ("generation", "inspection"),
    ("rl",),
    ("evaluation", "synth"),
    ("trainers",),
    ("identity", "manifest", "output_dir", "paired_checks", "preflight", "resume", "export"),
    ("stages",),
    ("pipeline", "planning", "artifacts", "cli", "__init__", "__main__"),
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}

# Which files may import a package, and never while they are imported themselves.
ONLY_IN = {
    "trl": {"trainers/sft.py", "trainers/reward.py", "generation/vllm_sampler.py"},
    "deepspeed": {"sharding/whole.py", "sharding/zero.py"},
    "bitsandbytes": set(),
    "openai": {"generation/text/endpoint.py"},
    "matplotlib": {"inspection/report.py", "evaluation/picture.py"},
    "vllm": set(),
    "llmcompressor": {"export/gptq.py"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_level():
    assert {part(path) for path in modules()} <= LEVEL_OF.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    for name in imports(path, top_level_only=True):
        if name.startswith("chatrlhf."):
            assert LEVEL_OF[name.split(".")[1]] <= LEVEL_OF[part(path)], f"{path.name} imports {name}"


def test_the_maths_knows_no_configuration_and_no_model():
    for path in (PACKAGE / "functional").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("chatrlhf")}
        assert all(name.startswith("chatrlhf.functional") for name in ours), path.name


def test_optional_packages_are_imported_in_their_own_files_inside_functions():
    for path in modules():
        inside = {name.split(".")[0] for name in imports(path)}
        outside = {name.split(".")[0] for name in imports(path, top_level_only=True)}
        for package, files in ONLY_IN.items():
            assert package not in inside or str(path.relative_to(PACKAGE)) in files, f"{path} imports {package}"
            assert package not in outside, f"{path} imports {package} while it is imported"


@pytest.mark.parametrize("words", [("main.py", "--help"), ("-m", "chatrlhf", "init", "--help")])
def test_help_answers_without_torch(words):
    code = "import runpy, sys; sys.argv = sys.argv[1:]\ntry:\n    "
    code += (
        f"runpy.run_module({words[1]!r}, run_name='__main__')"
        if words[0] == "-m"
        else "runpy.run_path('main.py', run_name='__main__')"
    )
    code += (
        "\nexcept SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules, 'torch was imported'"
    )
    arguments = [words[1], *words[2:]] if words[0] == "-m" else list(words)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_no_module_is_longer_than_one_room():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in modules()}
    assert {name: n for name, n in lengths.items() if n > 420} == {}
