"""Accidents as users have them, each played from the command line: see ``python -m benchmarks.accidents --help``."""
