"""A network, whoever wrote it: resolved once, by every command."""
