"""Loading models: weights, adapters, quantization, tokenizers, and what was missing."""
