"""The small network and its artefact that the tests of shipping use."""

from tests.ship.conftest import images, onnx_art, preprocessing, tiny  # noqa: F401
