"""Which network: candidates and a constraint become a choice with reasons."""
