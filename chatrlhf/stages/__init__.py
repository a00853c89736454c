"""The stages, a function each; `pipeline.py` calls them one after the other."""
