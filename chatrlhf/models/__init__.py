"""Models: how they are made or loaded, and the actor-critics that PPO trains."""
