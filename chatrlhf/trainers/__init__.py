"""The three trainers, and the checkpoints they share."""
