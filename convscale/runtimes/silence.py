"""Exporters print and warn about their own insides; users see only what they can act on."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

_LOGGERS = (
    "torch.onnx",
    "torch.export",
    "torch.utils.cpp_extension",
    "torch._dynamo",
    "torch._inductor",
    "torch.fx",
    "onnxscript",
    "onnx_ir",
    "nncf",
    "openvino",
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back warnings, prints and log lines below errors of the exporters; an exception goes through."""
    import logging  # slow to import

    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
