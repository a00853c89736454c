"""Mutants: one-line changes that a suite has to notice, drawn once from a seed and kept in `tests/mutants.json`.

    python tests/mutants.py draw            # draw them anew from the sources as they are
    python tests/mutants.py run --out FILE  # run the suite on each; who kills it is written down
    python tests/mutants.py check FILE      # compare a run with the one that is kept: nothing may be lost

A mutant lives in a process that is forked off one with PyTorch loaded: an import hook gives the changed source, and
pytest runs the tests that concern the module until one fails. Tests that start processes of their own see the sources
as they are, so a mutant that only they would kill counts as alive. Tests of the default suite come first; where they
all pass, those marked slow.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "chatrlhf"
KEPT = Path(__file__).with_suffix(".json")
COUNT, SEED, SECONDS = 150, 20261126, 150

# Sources, how many mutants are drawn from each, and the tests that concern them, the nearest first.
AREAS = [
    ("functional/*.py", 35, "functional test_trl_equality.py rl test_ppo_in_one_file.py"),
    ("rl/*.py", 41, "rl test_trl_equality.py models/test_actor_critic.py end_to_end/test_batches.py"),
    ("rollout/[cdeks]*.py", 30, "rollout rl/test_scoring.py rl/test_scoring_seq2seq.py"),
    ("rollout/llama_cpu.py", 5, "rollout"),
    ("data/encoder*.py", 15, "data field/test_chat_templates.py"),
    ("data/tokenization.py", 8, "data field/test_chat_templates.py"),
    ("runtime/checkpoints.py", 6, "runtime stages field/test_resumed_runs.py end_to_end/test_batches.py"),
    ("runtime/atomic_files.py", 6, "runtime stages field/test_resumed_runs.py tools/export/test_delta.py"),
    ("sharding/checkpoint_layout.py", 5, "sharding stages runtime"),
]
SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}


class Mutate(ast.NodeTransformer):
    """Counts the places of a module that can be changed, or changes the one numbered ``at``."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.seen, self.lines = at, 0, []

    def _here(self, node: ast.AST) -> bool:
        self.lines.append(node.lineno)
        self.seen += 1
        return self.seen - 1 == self.at

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        # `a | b` of types is an annotation, and no arithmetic.
        if type(node.op) in SWAPS and self._here(node):
            node.op = SWAPS[type(node.op)]()
        return self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if type(node.ops[0]) in SWAPS and self._here(node):
            node.ops[0] = SWAPS[type(node.ops[0])]()
        return self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        if self._here(node):
            node.op = SWAPS[type(node.op)]()
        return self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        if isinstance(node.op, ast.Not | ast.USub | ast.Invert) and self._here(node):
            return node.operand
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            return ast.copy_location(ast.Constant(not node.value), node) if self._here(node) else node
        if isinstance(node.value, int | float) and self._here(node):
            return ast.copy_location(ast.Constant(node.value + 1), node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Bodies alone: neither annotations nor decorators."""
        node.body = [self.visit(each) for each in node.body]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return node


def draw() -> list[dict[str, Any]]:
    """The mutants, as file, number of the place, line and what the line says."""
    rng, found = random.Random(SEED), []
    for pattern, count, _ in AREAS:
        places = []
        for path in sorted(PACKAGE.glob(pattern)):
            counted = Mutate()
            counted.visit(ast.parse(path.read_text(encoding="utf-8")))
            lines = path.read_text(encoding="utf-8").splitlines()
            places += [(path, n, line, lines[line - 1].strip()) for n, line in enumerate(counted.lines)]
        for path, number, line, text in sorted(rng.sample(places, min(count, len(places)))):
            file = str(path.relative_to(PACKAGE))
            found.append({"file": file, "place": number, "line": line, "text": text, "area": pattern})
    return found


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module of the package with a change."""

    def __init__(self, mutant: dict[str, Any]) -> None:
        self.name = "chatrlhf." + mutant["file"].removesuffix(".py").replace("/", ".")
        self.path = PACKAGE / mutant["file"]
        tree = Mutate(mutant["place"]).visit(ast.parse(self.path.read_text(encoding="utf-8")))
        self.code = compile(ast.fix_missing_locations(tree), str(self.path), "exec")

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        exec(self.code, module.__dict__)


class Killer:
    """A pytest plugin that remembers the first test that failed."""

    def __init__(self) -> None:
        self.failed: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self.failed is None:
            self.failed = f"{report.nodeid} (import)"


def killer_of(mutant: dict[str, Any], marks: str) -> str | None:
    """The test that a mutant fails, "(time)" where it does not end, None where all pass."""
    tests = next(tests for pattern, _, tests in AREAS if pattern == mutant["area"]).split()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
        import pytest

        sys.meta_path.insert(0, Finder(mutant))
        plugin = Killer()
        words = [str(ROOT / "tests" / test) for test in tests]
        pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", marks, *words], plugins=[plugin])
        os.write(write, (plugin.failed or "").encode())
        os._exit(0)
    os.close(write)
    ends = time.monotonic() + SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > ends:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)
            return "(time)"
        time.sleep(0.05)
    failed = os.read(read, 4096).decode()
    os.close(read)
    return failed or None


def run(mutants: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    import peft  # noqa: F401  (loaded once, for all that are forked off)
    import pytest  # noqa: F401
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401

    torch.set_num_threads(1)
    for mutant in mutants:
        began = time.monotonic()
        suite, killer = "default", killer_of(mutant, "not slow and not nightly")
        if killer is None:
            suite, killer = "slow", killer_of(mutant, "slow and not nightly")
        mutant |= {"suite": suite if killer else None, "killer": killer, "seconds": round(time.monotonic() - began, 1)}
        yield mutant


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["draw", "run", "check"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=KEPT)
    parser.add_argument("--alive", action="store_true", help="run those alone that nothing has killed yet")
    parser.add_argument("--part", default="0/1", help="every n-th, from the k-th on: k/n")
    options = parser.parse_args()
    if options.what == "draw":
        mutants = draw()
    else:
        mutants = json.loads(KEPT.read_text(encoding="utf-8"))
    if options.what == "check":
        now = {(each["file"], each["line"], each["place"]): each for each in json.loads(options.file.read_text())}
        lost = [
            each for each in mutants if each["killer"] and not now[each["file"], each["line"], each["place"]]["killer"]
        ]
        print("\n".join(f"{each['file']}:{each['line']} {each['text']}" for each in lost) or "nothing is lost")
        return bool(lost)
    if options.what == "run":
        number, parts = map(int, options.part.split("/"))
        chosen = [each for each in mutants[number::parts] if not options.alive or not each.get("killer")]
        for mutant in run(chosen):
            print(mutant["file"], mutant["line"], mutant["suite"], mutant["killer"], mutant["seconds"], flush=True)
        mutants = mutants[number::parts] if parts > 1 else mutants
    options.out.write_text(json.dumps(mutants, indent=1) + "\n", encoding="utf-8")
    killed = sum(bool(each.get("killer")) for each in mutants)
    print(f"{killed} of {len(mutants)} killed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
