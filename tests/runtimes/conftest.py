"""The small network, its pictures and its artefact."""

from tests.ship.conftest import images, onnx_art, preprocessing, tiny

__all__ = ["images", "onnx_art", "preprocessing", "tiny"]
