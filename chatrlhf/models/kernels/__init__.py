"""Faster forms of what transformers computes, each equal to it."""
