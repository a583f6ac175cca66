"""Class activation maps of modules: exact where the head is an average pool and a linear layer (Zhou et al. 2016, arXiv
1512.04150), and by gradients elsewhere (Selvaraju et al. 2017, arXiv 1610.02391).

Neither asks for names of a network's parts: the linear layer and the map in front of the pool are found by running it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from convscale.errors import UserError, first_line, naming_extras

KEPT_MAPS = 12
"""Maps of the classifier's width that are looked at, the last of the run first."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far a map's mean may lie from what the classifier sees, relative; 1e-2 in half precision."""


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """What a network with a pooled linear head did with a batch."""

    outputs: Tensor
    """(N, classes)."""
    features: Tensor
    """(N, C, h, w): the map whose mean the classifier sees."""
    weight: Tensor
    """(classes, C)."""


def linear_head(net: nn.Module) -> nn.Linear | None:
    """The classifier, by timm's convention, else the last linear layer; None: there is none."""
    named = getattr(net, "get_classifier", None)
    head = named() if callable(named) else None
    if isinstance(head, nn.Module):
        return head if isinstance(head, nn.Linear) else None
    return next((module for module in reversed(list(net.modules())) if isinstance(module, nn.Linear)), None)


def pooled_run(net: nn.Module, images: Tensor) -> Pooled | None:
    """One batch through the network, with the map in front of the pool.

    Args:
        net: in evaluation mode.
        images: (N, C, H, W) as it takes them.

    Returns:
        None where what the classifier sees is the mean of no map, so that it has no exact maps.
    """
    head = linear_head(net)
    if head is None:
        return None
    watch = _Watch(head)
    handles = [module.register_forward_pre_hook(watch.before) for module in net.modules()]
    handles += [module.register_forward_hook(watch.after) for module in net.modules()]
    try:
        with torch.no_grad():
            outputs = net(images)
    finally:
        for handle in handles:
            handle.remove()
    features = watch.features()
    return None if features is None else Pooled(outputs=outputs, features=features, weight=head.weight.detach())


class _Watch:
    """The maps of a run, in order."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.maps: deque[Tensor] = deque(maxlen=KEPT_MAPS)
        self.seen: Tensor | None = None
        self._last: Tensor | None = None
        self._pooled = False

    def before(self, module: nn.Module, given: tuple[object, ...]) -> None:
        """A module is called."""
        for value in given:
            self._keep(value)
        if module is self.head and given and isinstance(given[0], Tensor):
            self.seen = given[0]

    def after(self, _module: nn.Module, _given: tuple[object, ...], result: object) -> None:
        """A module has answered."""
        self._keep(result)

    def _keep(self, value: object) -> None:
        if not isinstance(value, Tensor) or value.ndim != 4:
            return
        if value.shape[1] == self.head.in_features:
            self.maps.append(value)
        if value.shape[2] * value.shape[3] > 1:
            self._last, self._pooled = value, False
        elif self._last is not None:
            # The first map of one place behind one of several: is it its average?
            self._pooled = value.shape[:2] == self._last.shape[:2] and _is_mean(self._last, value.flatten(1))
            self._last = None

    def features(self) -> Tensor | None:
        """The map whose mean the classifier has seen, the largest of several; None: there is none."""
        if self.seen is None or self.seen.ndim != 2:
            return None
        fitting = [each for each in self.maps if len(each) == len(self.seen) and _is_mean(each, self.seen)]
        largest = max(reversed(fitting), key=lambda each: each.shape[2] * each.shape[3], default=None)
        if largest is not None and largest.shape[2] * largest.shape[3] == 1 and self._pooled:
            return None  # layers stand between the pool and the classifier
        return largest


def _is_mean(features: Tensor, pooled: Tensor) -> bool:
    near = TOLERANCE.get(pooled.dtype, 1e-2) * float(pooled.abs().max().clamp(min=1e-30))
    return bool((features.mean((2, 3)) - pooled).abs().max() <= near)


def class_shares(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What each place of a map adds to its image's logit.

    Args:
        features: (N, C, h, w).
        weight: (classes, C).
        targets: int64 (N,).

    Returns:
        (N, h, w): summed over places, the target's logit minus its bias.
    """
    places = features.shape[2] * features.shape[3]
    return torch.einsum("nchw,nc->nhw", features, weight[targets].to(features.dtype)) / places


def last_map(net: nn.Module, run: Callable[[], object]) -> nn.Module:
    """The module whose output is the network's last map of more than one place; of one place where there is no other.

    Raises:
        UserError: it makes no map (N, C, h, w).
    """
    found: list[tuple[int, nn.Module]] = []

    def look(module: nn.Module, _: object, result: object) -> None:
        if isinstance(result, Tensor) and result.ndim == 4:
            found.append((result.shape[2] * result.shape[3], module))

    handles = [module.register_forward_hook(look) for module in net.modules() if module is not net]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    several = [module for places, module in found if places > 1]
    if not found:
        raise UserError(f"{type(net).__name__} makes no map (N, C, h, w), so it has no gradcam; use occlusion")
    return several[-1] if several else found[-1][1]


def gradcam(
    score: Callable[[Tensor], Tensor], layer: nn.Module, images: Tensor, targets: np.ndarray, *, batch_size: int
) -> np.ndarray:
    """Maps by gradients, through captum.

    Args:
        score: images -> (N, classes), differentiable.
        layer: whose output is the map.
        images: (N, C, H, W).
        targets: (N,).
        batch_size: images per call.

    Returns:
        (N, h, w), at least 0.

    Raises:
        UserError: captum is not installed, or no gradient reaches the map.
    """
    with naming_extras("gradcam"):
        from captum.attr import LayerGradCam
    method = LayerGradCam(score, layer)
    rows = []
    for start in range(0, len(images), batch_size):
        some = slice(start, start + batch_size)
        try:
            found = method.attribute(
                images[some], target=torch.as_tensor(targets[some], device=images.device), relu_attributions=True
            )
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"gradcam of {type(layer).__name__} fails: {first_line(error)}; use occlusion") from error
        assert isinstance(found, Tensor), "one layer gives one map"
        rows.append(found.detach().squeeze(1).double().cpu().numpy())
    return np.concatenate(rows)
