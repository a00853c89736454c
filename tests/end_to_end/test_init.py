"""`chatrlhf init DIR`: what an installed package gives its user to start from."""

from __future__ import annotations

import subprocess
import sys

from chatrlhf.cli import main


def test_the_copied_artifacts_work_from_their_own_folder(tmp_path, capsys):
    folder = tmp_path / "project"
    assert main(["init", str(folder)]) == 0
    written = capsys.readouterr().out.splitlines()
    assert str(folder / "config.yaml") in written and all((tmp_path / path).exists() for path in written)
    done = subprocess.run(
        [sys.executable, "artifacts/main.py", "config.yaml", "--dry-run"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "RL: " in done.stdout


def test_nothing_is_written_over(tmp_path, capsys):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "config.yaml").write_text("mine")
    assert main(["init", str(folder)]) == 2
    assert "config.yaml is there already" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["config.yaml"] and (
        folder / "config.yaml"
    ).read_text() == "mine"
