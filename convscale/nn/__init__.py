"""A spec becomes a module."""
