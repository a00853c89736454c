"""One PPO iteration, step by step: scoring, experience, update; plus the KL controller and the rewards."""
