"""`chatrlhf reproduce`: a run made again beside itself, and compared."""
