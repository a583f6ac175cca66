"""What a network costs here: measured, in any runtime."""
