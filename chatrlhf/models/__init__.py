"""Models: how they are made or loaded, and the topologies that PPO trains."""
