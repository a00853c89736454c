"""What is done with finished weights: merged, taken apart and put together, in few bits, on the hub."""
