"""An architecture as a value; nothing here imports torch."""
