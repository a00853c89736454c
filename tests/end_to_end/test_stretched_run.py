"""Three stages at twice the positions that the model was made for: every result says so, and loads like that."""

import json

from small_run import settings, write_files
from transformers import AutoModelForCausalLM

from chatrlhf import load_config, load_reward_model, run


def test_stretched_positions_go_through_all_stages(tmp_path, one_thread):
    write_files(tmp_path)
    made = settings(tmp_path)
    made["actor_config"] |= {"rope_scaling": {"type": "linear", "factor": 2}, "max_sequence_length": 128}
    made["actor_config"]["tiny"] |= {"max_position_embeddings": 64}
    made["trainer_config"] |= {"total_episodes": 16, "eval_interval": None}
    result = run(load_config(made | {"output_dir": str(tmp_path / "run")}))
    for folder in ("actor", "reward", "actor_rl", "critic"):
        saved = json.loads((tmp_path / "run" / folder / "config.json").read_text())
        assert saved["rope_parameters"] == {"factor": 2.0, "rope_theta": 10000.0, "rope_type": "linear"}
        assert saved["max_position_embeddings"] == 64
    assert AutoModelForCausalLM.from_pretrained(result.stages["RL"].checkpoint).config.rope_parameters["factor"] == 2.0
    assert load_reward_model(tmp_path / "run" / "reward").encoder.max_length == 128
