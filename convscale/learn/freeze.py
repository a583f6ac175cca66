"""Which parts of a network are trained: all of it, or only its head."""

from __future__ import annotations

from torch import nn


def set_trainable(net: nn.Module, *, frozen: bool) -> None:
    """Leave only the head trainable while ``frozen``; frozen norms use the statistics they came with and keep them.

    Call it after ``net.train()``.
    """
    head = head_parameters(net)
    for name, param in net.named_parameters():
        param.requires_grad_(not frozen or name in head)
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
