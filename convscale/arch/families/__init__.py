"""Families of architectures, one file each: a table of specs from its paper.

To add a family, put a file beside the others that defines ``SPECS``, a mapping from name to ``NetSpec``. Nothing else
has to know of it: every file in this folder is read by ``load``, and its names then work wherever a model's name goes.

* ``tresnet.py`` and ``resnet.py`` show a function with the family's ingredients as arguments.
* ``mobile.py`` and ``mixnet.py`` show a paper's table, row by row (``arch/rows.py``).
* ``efficientnet.py`` shows members that are scaled from one baseline (``arch/multipliers.py``).
* Weights of others load where ``nn/keymaps.py`` has a row for the family. A new kind of block starts in
  ``arch/block.py``.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from convscale.arch.spec import NetSpec

ORDER = ("tresnet", "efficientnet", "mobile", "mixnet", "resnet")
"""The files that come first, in this order, wherever architectures are gone through; others follow by name."""


def load() -> dict[str, NetSpec]:
    """The specs of every family file by name.

    Raises:
        ValueError: two families give a spec the same name.
    """
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    specs: dict[str, NetSpec] = {}
    for file in sorted(files, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        table: dict[str, NetSpec] = import_module(f"{__name__}.{file}").SPECS
        if taken := sorted(set(specs) & set(table)):
            raise ValueError(f"{file}.py defines {taken[0]!r}, which another family has")
        specs |= table
    return specs
