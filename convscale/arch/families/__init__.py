"""Families of architectures, one file each: a table of specs from its paper."""
