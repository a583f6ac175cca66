"""Images become trained weights."""
