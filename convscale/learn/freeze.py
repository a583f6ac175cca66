"""Which parts of a network are trained: all of it, or only its head."""

from __future__ import annotations

from torch import nn

from convscale.learn.recipe import Recipe


class Freezing:
    """What of a network is trained at each step of a run: the head alone for the first ``freeze_epochs``, then all that
    was trainable when it was given. Where time ends the run they are that share of it.

    Args:
        net: as it was given.
        recipe: how many epochs, and of how many.
    """

    def __init__(self, net: nn.Module, recipe: Recipe) -> None:
        self._net, self._recipe = net, recipe
        self.frozen = False
        """The head alone is trained."""
        self._given, self._joins_at = trainable(net), recipe.freeze_epochs / recipe.epochs

    def begin_epoch(self, position: float) -> None:
        """Put the network into training mode; ``position`` is the share of the run that is done."""
        self.frozen = position < self._joins_at
        self._net.train()
        if self._recipe.freeze_epochs:
            set_trainable(self._net, frozen=self.frozen, given=self._given)
        if self._recipe.keep_statistics:
            keep_statistics(self._net)

    def before_step(self, position: float) -> None:
        """Let all layers join where it is time."""
        if self.frozen and position >= self._joins_at:
            self.begin_epoch(position)

    def restore(self) -> None:
        """Leave trainable what was."""
        for name, param in self._net.named_parameters():
            param.requires_grad_(name in self._given)


def trainable(net: nn.Module) -> frozenset[str]:
    """Names of the parameters that are trained."""
    return frozenset(name for name, param in net.named_parameters() if param.requires_grad)


def set_trainable(net: nn.Module, *, frozen: bool, given: frozenset[str]) -> None:
    """Leave only the head trainable while ``frozen``, else all that was ``given`` so; frozen norms use the statistics
    they came with and keep them.

    Call it after ``net.train()``.
    """
    head = head_parameters(net)
    for name, param in net.named_parameters():
        param.requires_grad_(name in given and (not frozen or name in head))
    for module in net.modules() if frozen else ():
        params = list(module.parameters(recurse=False))
        if (params or list(module.buffers(recurse=False))) and not any(param.requires_grad for param in params):
            module.eval()


def keep_statistics(net: nn.Module) -> None:
    """Norms use their running statistics instead of the batch's, and leave them as they are; their weights still learn.

    Call it after ``net.train()``.
    """
    for module in net.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()


def head_parameters(net: nn.Module) -> set[str]:
    """Names of the classifier's parameters: by ``get_classifier`` (timm's convention), else the last module that has
    any.
    """
    classifier = net.get_classifier() if hasattr(net, "get_classifier") else None  # pyright: ignore[reportCallIssue]
    if isinstance(classifier, nn.Module):
        own = {id(param) for param in classifier.parameters()}
    else:
        owners = [module for module in net.modules() if any(True for _ in module.parameters(recurse=False))]
        own = {id(param) for param in owners[-1].parameters(recurse=False)}
    return {name for name, param in net.named_parameters() if id(param) in own}
