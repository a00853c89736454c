"""One PPO step against TRL 1.12.0's PPOTrainer, from the same files; see `__main__.py`."""
