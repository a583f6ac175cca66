"""What a network would cost on a device that is not here."""
