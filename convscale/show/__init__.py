"""Records become something to look at."""
