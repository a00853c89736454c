"""What is done with finished weights: adapters merged, differences to a base made and applied."""
