"""Sampling responses: the rollout engine."""
