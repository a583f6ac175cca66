"""A module becomes a running, checked artefact."""
