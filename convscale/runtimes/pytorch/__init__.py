"""PyTorch: runs modules and ``torch.export`` archives, as they are or compiled. Importing this loads no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from convscale.errors import UserError
from convscale.runtimes.base import Opening, Runtime, register

if TYPE_CHECKING:
    from convscale.runtimes.pytorch.runner import TorchRunner


class PyTorch(Runtime):
    """What PyTorch's runtimes share."""

    formats = ("torch",)
    opens_modules = True
    library = "torch"
    install = 'pip install "convscale[train]"'
    devices = ("cpu", "cuda")
    precisions = ("fp32", "amp", "amp_bf16", "bf16", "fp16")
    layouts = ("nchw", "nhwc")

    def open(self, source: object, how: Opening) -> TorchRunner:
        from convscale.runtimes.pytorch.program import read_program
        from convscale.runtimes.pytorch.runner import TorchRunner

        if isinstance(source, Path):
            if source.suffix != ".pt2":
                raise UserError(f"runtime {self.name} opens modules, not {source.name}")
            source = read_program(source)
        return TorchRunner(source, self.name, how)


@register
class Eager(PyTorch):
    """Operator by operator."""

    name = "eager"
    order = 1
    trains = True


class _NeedsCompiler(PyTorch):
    def installed(self) -> bool:
        import shutil  # slow to import

        compiler = shutil.which("g++") or shutil.which("clang++") or os.environ.get("CXX")
        return bool(compiler) and super().installed()


@register
class Compiled(_NeedsCompiler):
    """``torch.compile``."""

    name = "compiled"
    order = 2
    trains = True


@register
class CompiledFrozen(_NeedsCompiler):
    """``torch.compile``, weights as constants and laid out for the processor."""

    name = "compiled-frozen"
    order = 3


@register
class CompiledMax(_NeedsCompiler):
    """``torch.compile(mode="max-autotune")``: kernels chosen by timing them, and launched as one CUDA graph. It
    compiles for minutes, for one shape of a batch; the processor gains nothing by it.
    """

    name = "compiled-max"
    order = 4
    devices = ("cuda",)
