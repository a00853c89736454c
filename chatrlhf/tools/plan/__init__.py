"""What a run will need before it is paid for: parameters, memory by phase, steps, tokens, time."""
