"""A module becomes a file."""
