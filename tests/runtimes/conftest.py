"""The small network and its artefact that the tests of shipping use."""

from tests.ship.conftest import all_as_fast, images, onnx_art, preprocessing, tiny  # noqa: F401
