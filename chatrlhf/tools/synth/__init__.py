"""Data made to order: dialogues, scores and prompts, written and judged by a language model."""
