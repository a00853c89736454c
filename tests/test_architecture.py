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
    ("errors", "conversation", "functional"),
    ("types", "config", "compat"),
    ("runtime",),
    ("data", "samples", "sharding"),
    ("models",),
    ("rollout",),
    ("rl",),
    ("stages",),
    ("preflight",),
    ("pipeline", "__init__"),
    ("tools",),
    ("cli", "__main__"),
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}

# Which files may import a package, and never while they are imported themselves.
ONLY_IN = {
    "trl": {"stages/sft.py", "stages/reward.py", "rollout/vllm.py", "tools/plan/sft_reward_memory.py"},
    "deepspeed": {"sharding/gather.py", "sharding/deepspeed.py"},
    "bitsandbytes": set(),
    "openai": {"tools/synth/llm/openai_endpoint.py"},
    "matplotlib": {"tools/inspect/report.py", "tools/evaluate/report.py"},
    "vllm": set(),
    "llmcompressor": {"tools/export/gptq.py"},
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


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules_imported(path: Path) -> set[str]:
    """The package's own modules that a file imports anywhere, also inside functions and for type checkers alone."""
    known, found = {name_of(each) for each in modules()}, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "chatrlhf":
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "chatrlhf"}
    return found - {name_of(path)}


def test_every_module_has_a_level():
    assert {part(path) for path in modules()} <= LEVEL_OF.keys()


def test_the_package_has_at_most_twenty_rooms():
    assert len({part(path) for path in modules()}) <= 20


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    for name in modules_imported(path):
        room = name.split(".")[1] if "." in name else "__init__"
        assert LEVEL_OF[room] <= LEVEL_OF[part(path)], f"{path.name} imports {name}"


def test_nothing_below_the_command_line_imports_tools():
    for path in modules():
        if part(path) not in ("tools", "cli", "__main__"):
            assert not [name for name in modules_imported(path) if name.startswith("chatrlhf.tools")], path


def test_no_module_is_in_a_circle():
    graph = {name_of(path): modules_imported(path) for path in modules()}
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert not graph, f"imported in a circle, or above one: {sorted(graph)}"


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
