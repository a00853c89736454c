"""Facts of a run that --resume keeps, and what a manifest says of a stage while it trains."""

from __future__ import annotations

import json

from chatrlhf.config.schema import Config
from chatrlhf.runtime.manifest import FILE_NAME, Manifest


def test_a_fact_is_made_once_and_kept_on_resume(tmp_path):
    manifest = Manifest.open(tmp_path, resume=False)
    manifest.begin(Config(), ["RL"])
    assert manifest.fact("date", lambda: "2024-02-29") == "2024-02-29" == manifest.fact("date", lambda: "later")
    resumed = Manifest.open(tmp_path, resume=True)
    assert resumed.fact("date", lambda: "later") == "2024-02-29"
    assert Manifest.open(tmp_path, resume=False).fact("date", lambda: "later") == "later"


def test_hashes_are_written_when_a_stage_begins_and_kept_when_it_ends(tmp_path):
    manifest = Manifest.open(tmp_path, resume=False)
    assert not manifest.has_begun("RL")
    manifest.start("RL", {"data": {"a.json": "hash"}}, {"trainer_config.gamma": 1.0})
    stored = json.loads((tmp_path / FILE_NAME).read_text())["stages"]["RL"]
    assert stored["status"] == "begun" and stored["made_from"] == {"data": {"a.json": "hash"}}
    assert manifest.has_begun("RL") and not manifest.is_done("RL")
    manifest.finish("RL", {"model": "base", "output": "actor_rl"})
    stored = json.loads((tmp_path / FILE_NAME).read_text())["stages"]["RL"]
    assert list(stored)[0] == "status" and stored["status"] == "done"
    assert stored["made_from"] == {"data": {"a.json": "hash"}} and stored["settings"] == {"trainer_config.gamma": 1.0}
