"""Tools around training: planning, synthetic data, data inspection, export, evaluation."""
