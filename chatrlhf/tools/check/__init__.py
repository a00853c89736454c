"""`chatrlhf check`: what could go wrong in a run, measured before it is paid for."""
