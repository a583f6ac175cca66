"""Modules that hold a norm with its activation, where converters of other libraries put a plain norm in its place."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from convscale.errors import UserError
from convscale.nn.norm import BatchNormAct, synchronised


class HoldsNorms(nn.Module):
    """A module whose norms keep their activations: ``nn.SyncBatchNorm.convert_sync_batchnorm`` (Lightning's
    ``sync_batchnorm``) takes a BatchNormAct for a batch norm alone and puts a SyncBatchNorm in its place, by
    ``add_module``; here a BatchNormAct that shares its statistics takes it.
    """

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As torch's.

        Raises:
            UserError: a plain norm of another kind would take the place of a norm with an activation.
        """
        old = self._modules.get(name)
        if isinstance(old, BatchNormAct) and not isinstance(module, BatchNormAct):
            if isinstance(module, nn.SyncBatchNorm):
                module = synchronised(old, module)
            elif old.activation != "identity" and _is_plain_norm(module):
                raise UserError(
                    f"{type(module).__name__} in place of a BatchNormAct would take its activation, {old.activation}, "
                    "away; freeze norms with .eval() and .requires_grad_(False)"
                )
        super().add_module(name, module)


def _is_plain_norm(module: nn.Module | None) -> bool:
    """Whether it is a batch norm of any library that says of no activation."""
    is_norm = isinstance(module, _NormBase) or hasattr(module, "running_var")
    return is_norm and not (hasattr(module, "activation") or hasattr(module, "act"))
