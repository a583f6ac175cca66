"""An artefact behind a port: the Open Inference Protocol, batches, limits, a page; no torch."""
