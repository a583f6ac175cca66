"""Files become pixels."""
