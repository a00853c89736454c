"""Mutants: one-line changes that a suite has to notice, drawn once from a seed and kept in `tests/mutants.json`.

    python tests/mutants.py draw           # draw them anew from the sources as they are
    python tests/mutants.py calls          # run the suite once, to learn which test calls which function
    python tests/mutants.py run --out FILE # run on each the tests that call its function; who kills it is written down
    python tests/mutants.py check FILE     # compare a run with the one that is kept: nothing may be lost

A mutant is a copy of this tree with one line changed. A process forked off one that has PyTorch loaded runs in it the
tests that call the changed function, also those that call it in a process of their own (tests/callers), until one
fails: first those of `make test`, and where they all pass those that are slow, the nearest and quickest first, up to a
limit. So what is alive is alive as far as was looked.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "chatrlhf"
KEPT = Path(__file__).with_suffix(".json")
CALLS = ROOT / "build" / "calls"
SEED = 20261126
SUITES = {"default": "not slow", "slow": "slow and not nightly"}
SECONDS = {"default": 90, "slow": 240}  # of the tests that call a function so many are run, the nearest first

# Sources, and how many mutants are drawn from each.
AREAS = {
    "functional/*.py": 35,
    "rl/*.py": 41,
    "rollout/[cdeks]*.py": 30,
    "rollout/llama_cpu.py": 5,
    "data/encoder*.py": 15,
    "data/tokenization.py": 8,
    "runtime/checkpoints.py": 6,
    "runtime/atomic_files.py": 6,
    "sharding/checkpoint_layout.py": 5,
}
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
    for pattern, count in AREAS.items():
        places = []
        for path in sorted(PACKAGE.glob(pattern)):
            counted = Mutate()
            counted.visit(ast.parse(path.read_text(encoding="utf-8")))
            lines = path.read_text(encoding="utf-8").splitlines()
            places += [(path, n, line, lines[line - 1].strip()) for n, line in enumerate(counted.lines)]
        for path, number, line, text in sorted(rng.sample(places, min(count, len(places)))):
            file = str(path.relative_to(PACKAGE))
            found.append({"file": file, "place": number, "line": line, "text": text})
    return found


def learn_calls() -> None:
    """Run each suite with every call of the package's functions recorded, and every test timed."""
    CALLS.mkdir(parents=True, exist_ok=True)
    for suite, marks in SUITES.items():
        record = CALLS / f"{suite}.tsv"
        record.unlink(missing_ok=True)
        path = os.pathsep.join([str(ROOT / "tests" / "callers"), str(ROOT)])
        words = [
            "-n",
            "auto",
            "--dist",
            "loadfile",
            "-q",
            "-p",
            "sitecustomize",
            "-m",
            marks,
            "--junitxml",
            str(CALLS / f"{suite}.xml"),
        ]
        environment = os.environ | {"PYTHONPATH": path, "CALLERS": str(record), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, env=environment, check=True)


class Calls:
    """What `learn_calls` has found of one suite: the tests that call a function, and the seconds each takes."""

    def __init__(self, suite: str) -> None:
        self.seconds = {}
        for case in ElementTree.parse(CALLS / f"{suite}.xml").iter("testcase"):
            file = case.get("classname").replace(".", "/") + ".py"
            self.seconds[f"{file}::{case.get('name')}"] = float(case.get("time"))
        self.tests: dict[tuple[str, int], set[str]] = defaultdict(set)
        of_file, set_up = defaultdict(set), set()
        for line in (CALLS / f"{suite}.tsv").read_text(encoding="utf-8").splitlines():
            test, file, first, _ = line.split("\t")
            name, _, phase = test.rpartition(" (")
            if name in self.seconds:
                self.tests[file, int(first)].add(name)
                of_file[name.partition("::")[0]].add(name)
                if phase == "setup)":
                    set_up.add((file, int(first), name.partition("::")[0]))
        # What a fixture calls for the first test of a file, it may have called for all of them.
        for file, first, tests in set_up:
            self.tests[file, first] |= of_file[tests]

    def of(self, mutant: dict[str, Any]) -> list[str]:
        """The tests to run, file by file: its own folder's first, then the quickest.

        Of a line outside all functions: all that call a function of the file.
        """
        functions = (
            [function_at(mutant)] if function_at(mutant) else {f for file, f in self.tests if file == mutant["file"]}
        )
        found = set().union(*(self.tests[mutant["file"], first] for first in functions))
        files = defaultdict(list)
        for test in found:
            files[test.partition("::")[0]].append(test)
        own = f"tests/{Path(mutant['file']).parent}/"
        files = sorted(files.values(), key=lambda tests: (not tests[0].startswith(own), self.sum(tests)))
        return [test for tests in files for test in sorted(tests)]

    def sum(self, tests: list[str]) -> float:
        return sum(self.seconds.get(test, 0.1) for test in tests)

    def up_to(self, seconds: float, tests: list[str]) -> list[str]:
        kept = []
        for test in tests:
            seconds -= self.seconds.get(test, 0.1)
            if seconds < 0 and kept:
                break
            kept.append(test)
        return kept


def function_at(mutant: dict[str, Any]) -> int | None:
    """The first line, decorators included, of the innermost function around a mutant's line."""
    tree = ast.parse((PACKAGE / mutant["file"]).read_text(encoding="utf-8"))
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.lineno <= mutant["line"] <= node.end_lineno
    ]
    innermost = max(around, key=lambda node: node.lineno, default=None)
    return innermost and min([innermost.lineno, *(each.lineno for each in innermost.decorator_list)])


class Chosen:
    """A pytest plugin: of what was collected only the chosen tests, in their order, and the first that fails."""

    def __init__(self, tests: list[str]) -> None:
        self.order = {test: number for number, test in enumerate(tests)}
        self.failed: str | None = None

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted(
            (each for each in items if each.nodeid in self.order), key=lambda each: self.order[each.nodeid]
        )

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self.failed is None:
            self.failed = f"{report.nodeid} (import)"


def changed_tree(mutant: dict[str, Any], into: str) -> Path:
    """A copy of this tree, by links, in which one line is another."""
    tree = Path(into) / ROOT.name
    leave = shutil.ignore_patterns(".git", ".venv*", "build", "__pycache__", ".*_cache", "site", "*.log")
    shutil.copytree(ROOT, tree, copy_function=os.link, ignore=leave, symlinks=True)
    file = tree / "chatrlhf" / mutant["file"]
    changed = Mutate(mutant["place"]).visit(ast.parse(file.read_text(encoding="utf-8")))
    file.unlink()
    file.write_text(ast.unparse(ast.fix_missing_locations(changed)) + "\n", encoding="utf-8")
    return tree


def killer_of(mutant: dict[str, Any], tests: list[str], seconds: float) -> str | None:
    """The test that a mutant fails, "(time)" where it does not end, None where all pass."""
    with tempfile.TemporaryDirectory(dir=ROOT.parent, prefix="mutant-") as into:
        tree = changed_tree(mutant, into)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
            os.chdir(tree)
            sys.path.insert(0, str(tree))
            os.environ["PYTHONPATH"] = str(tree)
            import pytest

            plugin = Chosen(tests)
            files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
            pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files], plugins=[plugin])
            os.write(write, (plugin.failed or "").encode())
            os._exit(0)
        os.close(write)
        ends = time.monotonic() + seconds
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
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    import datasets  # noqa: F401  (loaded once, for all that are forked off)
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401
    import trl  # noqa: F401

    torch.set_num_threads(1)
    for mutant in mutants:
        text = (PACKAGE / mutant["file"]).read_text(encoding="utf-8").splitlines()[mutant["line"] - 1].strip()
        if text != mutant["text"]:
            sys.exit(f"{mutant['file']}:{mutant['line']} was {mutant['text']!r} when it was drawn; draw anew")
    suites = {suite: Calls(suite) for suite in SUITES if (CALLS / f"{suite}.tsv").exists()}
    for mutant in mutants:
        began, mutant["suite"], mutant["killer"] = time.monotonic(), None, None
        for suite, calls in suites.items():
            tests = calls.up_to(SECONDS[suite], calls.of(mutant))
            if tests and (killer := killer_of(mutant, tests, 60 + 5 * calls.sum(tests))):
                mutant |= {"suite": suite, "killer": killer}
                break
        mutant["seconds"] = round(time.monotonic() - began, 1)
        yield mutant


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["draw", "calls", "run", "check"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=KEPT)
    parser.add_argument("--alive", action="store_true", help="run those alone that nothing has killed yet")
    parser.add_argument("--part", default="0/1", help="every n-th, from the k-th on: k/n")
    options = parser.parse_args()
    if options.what == "calls":
        learn_calls()
        return 0
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
