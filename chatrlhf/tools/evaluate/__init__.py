"""Held-out prompts, sampled and judged; and the table that sets two policies side by side."""
