"""Whole runs with canaries in the environment and in a URL, and checkpoints with payloads: none leaks, none runs."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from hostile import line_about, torch_file
from resuming import configured, stop, write_case
from small_run import read_manifest, write_config, write_files
from standins.hub_server import hub_server

from chatrlhf import run
from chatrlhf.cli import main
from chatrlhf.runtime import fault_points
from chatrlhf.runtime.atomic_files import CONTENTS
from chatrlhf.runtime.file_hash import sha256_of

pytestmark = pytest.mark.slow

CANARY = "canary-0123456789abcdef"
NAMES = ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY")


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A reward endpoint that asks for a password, and its address with it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            is_known = self.headers.get("Authorization", "").startswith("Basic ")
            is_known = is_known and not self.path.startswith("/broken")
            self.send_response(200 if is_known else 401)
            self.end_headers()
            if is_known:
                self.wfile.write(json.dumps([float(len(text)) for text in body["completions"]]).encode())

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://me:{CANARY}@127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def assert_no_canary(folder: Path, *said: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"]
    assert files
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path
    for text in said:
        assert CANARY not in text


def fail(*_: object) -> None:
    raise RuntimeError(os.environ)


def replace_everywhere(config: Path, run_dir: Path, old: str, new: str) -> None:
    """In the configuration and in the record of the run, so that they agree."""
    config.write_text(config.read_text().replace(old, new))
    record = json.dumps(read_manifest(run_dir)).replace(old, new)
    (run_dir / "manifest.json").write_text(record)


def test_a_run_and_what_comes_of_it(tmp_path, endpoint, monkeypatch, capfd):
    write_files(tmp_path)
    more = {"reward_config__reward_fn": f"{endpoint}/scores?token={CANARY}", "trackers": ["tensorboard"]}
    config, run_dir = write_config(tmp_path, **more), tmp_path / "run"

    def command(*words: str) -> tuple[int, str, str]:
        status, said = main(list(words)), capfd.readouterr()
        assert_no_canary(tmp_path, said.out, said.err)
        return status, said.out, said.err

    status, out, err = command(str(config), "--output-dir", str(run_dir))
    assert status == 0 and "the reward is http://***@127.0.0.1" in out, err
    assert (run_dir / "trackers").exists() and "http://***@" in (run_dir / "manifest.json").read_text()

    # It fails in the midst of the last stage: by the endpoint, and by a fault of ours whose text has all keys.
    resume = [str(config), "--output-dir", str(run_dir), "--resume", "--set", "trainer_config.total_episodes=64"]
    replace_everywhere(config, run_dir, "/scores", "/broken")
    status, out, err = command(*resume)
    assert status == 2 and "http://***@127.0.0.1" in err and "401" in err, err
    replace_everywhere(config, run_dir, "/broken", "/scores")
    undo = fault_points.at("rl.step", fail)
    status, out, err = command(*resume)
    undo()
    assert status == 1 and "environ(" in err and "***" in err, err

    with hub_server(f"{CANARY}-HF_TOKEN") as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        assert command("export", "push", str(run_dir / "actor_rl"), "me/mine")[0] == 0
        assert command("export", "push", str(run_dir / "actor_rl"), "me/mine")[0] == 2
        assert all(CANARY.encode() not in content for content in hub.files["me/mine"].values())


# ----- checkpoints


def poison(checkpoint: Path, name: str, proof: Path) -> None:
    """A payload in place of a file, and a list of contents that says that it belongs there."""
    torch_file(checkpoint / name, proof)
    contents = json.loads((checkpoint / CONTENTS).read_text())
    contents[name] = {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256_of(checkpoint / name)}
    (checkpoint / CONTENTS).write_text(json.dumps(contents))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Two stages that were stopped; their configuration."""
    folder = tmp_path_factory.mktemp("case")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        tree = write_case(folder) | {"reward_config": {"reward_fn": f"judge_{folder.name}:length"}}
        for stage, step in (("ACTOR", 3), ("RL", 2)):
            stop(configured(tree, output_dir=str(folder / stage)), stage, step)
        yield folder, tree


OF_ACTOR = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin")
OF_RL = ("training.pt", "trained.safetensors", "optimizer.pt")


@pytest.mark.parametrize(
    "stage, name", [("ACTOR", name) for name in OF_ACTOR] + [("RL", name) for name in OF_RL], ids=lambda each: str(each)
)
def test_no_file_of_a_checkpoint_runs(case, tmp_path, stage, name):
    folder, tree = case
    run_dir = shutil.copytree(folder / stage, tmp_path / "run")
    (newest,) = sorted((run_dir / "checkpoints" / stage).glob("step-*"))[-1:]
    is_there = (newest / name).exists()
    poison(newest, name, tmp_path / "proof")
    config = configured(tree, output_dir=str(run_dir))
    if is_there and name != "training_args.bin":
        line_about(lambda: run(config, type=stage, resume=True))
    else:
        run(config, type=stage, resume=True)
    assert not (tmp_path / "proof").exists()
