"""An artefact behind LitServe, for `benchmarks.serve`: its workers pickle what they run, so it stands in a module."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import litserve as ls  # pyright: ignore[reportMissingImports]  # of the group `bench`
import numpy as np

from benchmarks.serve_peers import image_of
from convscale.artifact.artifact import load_artifact


class Api(ls.LitAPI):
    """Its payload is JSON, so an image comes in base64."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self.folder = folder

    def setup(self, device: str) -> None:
        """In its worker."""
        self.artifact = load_artifact(self.folder)

    def decode_request(self, request: dict[str, str], **_: Any) -> np.ndarray:
        """uint8 (H, W, C)."""
        return image_of(self.artifact, base64.b64decode(request["image"]))[0]

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        """Together."""
        return np.stack(inputs)

    def predict(self, x: np.ndarray, **_: Any) -> np.ndarray:
        """float32 (N, classes)."""
        return self.artifact(x)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        """Apart."""
        return list(output)

    def encode_response(self, output: np.ndarray, **_: Any) -> dict[str, str]:
        """In base64, too."""
        return {"row": base64.b64encode(output.tobytes()).decode()}


def run(folder: Path, port: int, *, delay_s: float) -> None:
    """Serve, at the artefact's batch."""
    api = Api(folder, max_batch_size=load_artifact(folder).batch_size, batch_timeout=delay_s, api_path="/infer")
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False)
