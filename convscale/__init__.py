"""convscale: pick, scale, train and ship image ConvNets by throughput.

The public names are resolved on first use, so that importing the package costs nothing: neither torch nor numpy is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "UserError": "errors",
    "NetSpec": "arch.spec",
    "load_spec": "arch.spec",
    "save_spec": "arch.spec",
    "list_models": "arch.zoo",
    "get_spec": "arch.zoo",
    "scale": "arch.scale",
    "create_model": "nn.net",
    "load_weights": "nn.weights",
    "export_weights": "nn.weights",
    "convert_norm": "nn.norm",
    "Conditions": "speed.conditions",
    "Measurement": "speed.timing",
    "Prediction": "speed.predict",
    "count": "speed.cost",
    "saved_bytes": "speed.memory",
    "predict_largest_batch": "speed.memory",
    "predict": "speed.predict",
    "calibrate": "speed.calibrate",
    "measure": "ship.measure",
    "export": "ship.export",
    "load_artifact": "ship.artifact",
    "verify": "ship.verify",
    "tune": "ship.tune",
    "export_fastest": "ship.fastest",
    "classify": "ship.classify",
    "choose": "choice",
    "train": "learn.train",
    "evaluate": "learn.evaluate",
    "fit": "pipeline",
}

__all__ = [*sorted(_PUBLIC), "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from convscale.arch.scale import scale as scale
    from convscale.arch.spec import NetSpec as NetSpec
    from convscale.arch.spec import load_spec as load_spec
    from convscale.arch.spec import save_spec as save_spec
    from convscale.arch.zoo import get_spec as get_spec
    from convscale.arch.zoo import list_models as list_models
    from convscale.errors import UserError as UserError
    from convscale.nn.net import create_model as create_model
    from convscale.nn.norm import convert_norm as convert_norm
    from convscale.nn.weights import export_weights as export_weights
    from convscale.nn.weights import load_weights as load_weights


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'convscale' has no attribute {name!r}")
    value = getattr(import_module(f"convscale.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
