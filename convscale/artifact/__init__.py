"""What was shipped: opened, checked and called."""
