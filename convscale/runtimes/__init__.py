"""Where networks run: arrays in, arrays out."""
