"""`chatrlhf data`: what is in a file of rows, what is wrong with it, and what a model would see of it."""
