"""Search: spaces of networks as values, trials on the user's data under a speed, and coefficients of scaling."""
