"""convscale: pick, scale, train and ship image ConvNets by throughput.

The public names stand in ``__init__.pyi`` and are resolved on first use, so that importing the package costs nothing:
neither torch nor numpy is loaded.
"""

import lazy_loader

from convscale._version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
