"""The maths of RLHF: tensors in, tensors out, no state, no configuration, no model.

Each function is short enough to check against its equation, which its docstring names.
"""
