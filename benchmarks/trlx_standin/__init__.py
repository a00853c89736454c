"""A stand-in for trlX 0.7.0, which needs a software stack of 2023: a loop that does the same work; see `loop.py`."""
