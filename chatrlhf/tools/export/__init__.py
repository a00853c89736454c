"""What is done with finished weights: merged, taken apart and put together, quantized, on the hub."""
