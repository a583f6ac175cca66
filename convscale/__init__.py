"""convscale: pick, scale, train and ship image ConvNets by throughput.

The public names stand in ``__init__.pyi`` and are resolved on first use, so that importing the package costs nothing:
neither torch nor numpy is loaded. What runs an artefact is there after a plain install; a name that needs torch says
in one line how to get it.
"""

import lazy_loader

from convscale._version import __version__ as __version__

_resolve, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]


def __getattr__(name: str) -> object:
    from convscale.errors import naming_extras

    with naming_extras(f"convscale.{name}"):
        return _resolve(name)
