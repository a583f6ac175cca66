"""What a network costs: counted, measured, predicted."""
