"""``explain``: where images speak for a class, by the map, by gradients, or by covering places."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np

from convscale.artifact.artifact import Artifact
from convscale.errors import UserError, check_text, check_whole, first_line, naming_extras
from convscale.maps.occlusion import GRID, occlusion
from convscale.maps.result import NOTHING, Maps, made, targets_of

if TYPE_CHECKING:
    import torch
    from torch import nn

METHODS = ("cam", "gradcam", "occlusion")
_NO_CAM = (
    "{name} has no exact class activation map: what its classifier sees is not the average of a map; use "
    'method="gradcam" or "occlusion"'
)


def explain(
    net_or_artifact: nn.Module | Artifact | Callable[..., object],
    images: torch.Tensor | np.ndarray,
    method: str = "cam",
    target: int | list[int] | np.ndarray | torch.Tensor | None = None,
    *,
    batch_size: int = 32,
    grid: int = GRID,
) -> Maps:
    """Show where images speak for a class.

    Args:
        net_or_artifact: a classifier (ours, timm's, any module with outputs (N, classes)), a detector that is called as
            torchvision's are, an artefact, or, for ``occlusion``, anything that takes images to (N, classes).
        images: float (N, C, H, W), normalised as the network takes them, for modules; uint8 (N, H, W, C), resized by
            ``preprocessing.resize``, for artefacts. A callable gets an array as it is given: uint8 is (N, H, W, C).
        method: ``cam``: each place's exact share of the logit, where the head is an average pool and a linear layer
            (Zhou et al. 2016, arXiv 1512.04150), of an artefact where it was exported with its features; ``gradcam``:
            by gradients, through captum, of any module (Selvaraju et al. 2017, arXiv 1610.02391); ``occlusion``: by
            what the output loses when a place is covered with the mean colour (Zeiler and Fergus 2014, section 4.2).
        target: the class that maps are of: a number for all images, or one for each; None: the likeliest of each. Of a
            detector its labels count, from 1 on; None: that of its surest box.
        batch_size: images per call of the network.
        grid: places along one side for ``occlusion``, which calls the network grid x grid times an image.

    Returns:
        Maps: ``values`` float32 (N, H, W) in [0, 1], ``targets`` (N,), ``raw`` (N, h, w). Of ``cam`` ``raw`` summed
        over places is the logit minus its bias. An image in which a detector finds nothing has the target -1 and a map
        of 0.

    Raises:
        UserError: a method that this network does not have, images of another kind, an unknown class.
    """
    check_text("method", method, METHODS)
    batch_size, grid = check_whole("batch_size", batch_size), check_whole("grid", grid, 2)
    if isinstance(net_or_artifact, Artifact):
        return _of_artifact(net_or_artifact, _array(images), method, target, batch_size, grid)
    with naming_extras("explaining a module"):
        from torch import nn

    if isinstance(net_or_artifact, nn.Module):
        return _of_module(net_or_artifact, images, method, target, batch_size, grid)
    if not callable(net_or_artifact):
        raise UserError(
            f"explain got a {type(net_or_artifact).__name__}; it must be a network, an artefact or a function from "
            "images to outputs"
        )
    return _of_function(net_or_artifact, images, method, target, batch_size, grid)


# ---------------------------------------------------------------- artefacts


def _of_artifact(
    artifact: Artifact, images: np.ndarray, method: str, target: object, batch_size: int, grid: int
) -> Maps:
    if method == "gradcam":
        raise UserError(
            'an artefact has no gradients; use method="occlusion", or "cam" where it was exported with its features'
        )
    if method == "cam" and not artifact.keeps_features:
        raise UserError(
            f"artefact {artifact.folder} keeps no feature map; export it with --with-features (with_features=True), or "
            'use method="occlusion"'
        )
    logits = artifact.logits(images, batch_size=batch_size)
    _some(images)
    targets, size = targets_of(target, logits), images.shape[1:3]
    if method == "cam":
        features = artifact.features(images, batch_size=batch_size).astype(np.float64)
        weight = artifact.head.weight[targets].astype(np.float64)
        places = features.shape[2] * features.shape[3]
        return made(method, np.einsum("nchw,nc->nhw", features, weight) / places, targets, size)
    mean = np.asarray(artifact.preprocessing.mean)
    raw = occlusion(
        artifact.logits,
        images,
        targets,
        cover=(255 * mean).round(),
        rows_first=True,
        batch_size=batch_size,
        grid=grid,
    )
    return made(method, raw, targets, size)


# ---------------------------------------------------------------- modules


def _of_module(net: nn.Module, images: object, method: str, target: object, batch_size: int, grid: int) -> Maps:
    import torch

    from convscale.nn.modes import evaluating

    parameter = next(net.parameters(), torch.empty(0))
    batch = _tensor(images).to(device=parameter.device, dtype=parameter.dtype)
    with evaluating(net):
        if _is_detector(net):
            return _of_detector(net, batch, method, target, batch_size, grid)
        if method == "cam":
            return _cam(net, batch, target, batch_size)

        def score(some: torch.Tensor) -> torch.Tensor:
            return _outputs(net, some)

        found = _numbers(score, batch, batch_size)
        targets = targets_of(target, found)
        return _searched(net, score, batch, targets, method, batch_size, grid)


def _searched(
    net: nn.Module,
    score: Callable[[torch.Tensor], torch.Tensor],
    batch: torch.Tensor,
    targets: np.ndarray,
    method: str,
    batch_size: int,
    grid: int,
) -> Maps:
    """By gradients or by covering, for outputs that ``score`` gives."""
    import torch

    from convscale.maps.cam import gradcam, last_map

    size = (int(batch.shape[2]), int(batch.shape[3]))
    if method == "gradcam":
        where = _body(net) if _is_detector(net) else net
        layer = last_map(where, lambda: score(batch[:1]))
        return made(method, gradcam(score, layer, batch, targets, batch_size=batch_size), targets, size)

    def outputs(some: np.ndarray) -> np.ndarray:
        return _numbers(score, torch.from_numpy(some).to(batch), batch_size)

    raw = occlusion(
        outputs,
        batch.detach().cpu().numpy(),
        targets,
        cover=0.5 if _is_detector(net) else 0.0,  # normalised images have the mean colour at 0
        rows_first=False,
        batch_size=batch_size,
        grid=grid,
    )
    return made(method, raw, targets, size)


def _cam(net: nn.Module, batch: torch.Tensor, target: object, batch_size: int) -> Maps:
    import torch

    from convscale.maps.cam import class_shares, pooled_run

    runs = []
    for some in batch.split(batch_size):
        run = pooled_run(net, some)
        if run is None:
            raise UserError(_NO_CAM.format(name=type(net).__name__))
        runs.append(run)
    outputs = torch.cat([run.outputs for run in runs])
    targets = targets_of(target, outputs.detach().cpu().double().numpy())
    chosen = torch.from_numpy(targets).to(batch.device)
    features = torch.cat([run.features for run in runs])
    raw = class_shares(features, runs[0].weight, chosen).cpu()
    exact = raw if raw.dtype in (torch.float32, torch.float64) else raw.float()
    return made("cam", exact.numpy(), targets, (int(batch.shape[2]), int(batch.shape[3])))


def _outputs(net: nn.Module, some: torch.Tensor) -> torch.Tensor:
    """(n, classes) of a classifier.

    Raises:
        UserError: it does not take these images, or gives something else.
    """
    import torch

    try:
        found = net(some)
    except UserError:
        raise
    except RuntimeError as error:
        raise UserError(
            f"{type(net).__name__} can not take images of shape {tuple(some.shape)}: {first_line(error)}"
        ) from error
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != len(some):
        what = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise UserError(f"{type(net).__name__} gives {what}; explain takes networks with outputs (N, classes)")
    return found


def _numbers(score: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, batch_size: int) -> np.ndarray:
    import torch

    with torch.no_grad():
        return torch.cat([score(some).double().cpu() for some in batch.split(batch_size)]).numpy()


# ---------------------------------------------------------------- detectors


def _is_detector(net: nn.Module) -> bool:
    """Whether a module is one of torchvision's detectors, or made of their parts."""
    return (
        hasattr(net, "backbone") and hasattr(net, "transform") and (hasattr(net, "head") or hasattr(net, "roi_heads"))
    )


def _body(net: nn.Module) -> nn.Module:
    """What makes a detector's maps, without its neck where it has one."""
    backbone = net.backbone
    body = getattr(backbone, "body", backbone)
    return cast("nn.Module", body)


def _of_detector(net: nn.Module, batch: torch.Tensor, method: str, target: object, batch_size: int, grid: int) -> Maps:
    """Maps of a detector's classes: the score of the surest box of a class is its output."""
    import torch

    if method == "cam":
        raise UserError(_NO_CAM.format(name=type(net).__name__))
    with torch.no_grad():
        found = [one for some in batch.split(batch_size) for one in net(list(some))]
    surest = [int(one["labels"][one["scores"].argmax()]) if len(one["scores"]) else NOTHING for one in found]
    known = max([int(one["labels"].max()) for one in found if len(one["labels"])], default=0)
    first, labels = _labels(net, known)
    asked = None if target is None else targets_of(target, np.zeros((len(batch), labels)), first=first)
    targets = np.array(surest, np.int64) if asked is None else asked
    seen = targets != NOTHING
    size = (int(batch.shape[2]), int(batch.shape[3]))
    if not seen.any():
        return made(method, np.zeros((len(batch), 1, 1)), targets, size)
    count = max(int(targets.max()), known) + 1

    def score(some: torch.Tensor) -> torch.Tensor:
        rows = []
        for one in net(list(some)):
            of = [one["scores"][one["labels"] == label] for label in range(count)]
            # Without a box nothing depends on the image; the sum over it keeps gradients defined.
            rows.append(torch.stack([each.max() if len(each) else one["scores"].sum() * 0 for each in of]))
        return torch.stack(rows)

    part = _searched(net, score, batch[torch.from_numpy(seen)], targets[seen], method, batch_size, grid)
    raw = np.zeros((len(batch), *part.raw.shape[1:]))
    raw[seen] = part.raw
    return made(method, raw, targets, size)


def _labels(net: nn.Module, known: int) -> tuple[int, int]:
    """The first of a detector's labels, and one more than the last: ours count from 1; of others the background at 0 is
    among them.
    """
    spec = getattr(net, "detector_spec", None)
    if spec is not None:
        return 1, spec.num_classes + 1
    for path in (
        "head.classification_head.num_classes",
        "head.classification_head.num_columns",
        "roi_heads.box_predictor.cls_score.out_features",
    ):
        value: object = net
        for name in path.split("."):
            value = getattr(value, name, None)
        if isinstance(value, int):
            return 0, value
    return 0, known + 1


# ---------------------------------------------------------------- anything else


def _of_function(
    function: Callable[..., object], images: object, method: str, target: object, batch_size: int, grid: int
) -> Maps:
    if method != "occlusion":
        raise UserError(f'{method} needs a network\'s parts; of a function there is method="occlusion" alone')
    batch = _array(images)
    if batch.ndim != 4:
        raise UserError(f"images have shape {batch.shape}; they must be (N, C, H, W), or uint8 (N, H, W, C)")
    _some(batch)
    rows_first = batch.dtype == np.uint8
    is_tensor = not isinstance(images, np.ndarray)

    def outputs(some: np.ndarray) -> np.ndarray:
        if is_tensor:
            import torch

            found = function(torch.from_numpy(some))
        else:
            found = function(some)
        array = _array(found).astype(np.float64)
        if array.ndim != 2 or len(array) != len(some):
            raise UserError(f"the function gives {array.shape} for {len(some)} images; it must give (N, classes)")
        return array

    targets = targets_of(target, np.concatenate([outputs(one) for one in _parts(batch, batch_size)]))
    axes = (0, 1, 2) if rows_first else (0, 2, 3)
    raw = occlusion(
        outputs,
        batch,
        targets,
        cover=batch.mean(axes),
        rows_first=rows_first,
        batch_size=batch_size,
        grid=grid,
    )
    return made(method, raw, targets, batch.shape[1:3] if rows_first else batch.shape[2:4])


def _parts(batch: np.ndarray, size: int) -> list[np.ndarray]:
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def _array(value: object) -> np.ndarray:
    """An array, or a tensor as one."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        return cast("torch.Tensor", value).detach().cpu().numpy()
    raise UserError(f"images are a {type(value).__name__}; they must be an array or a tensor")


def _tensor(images: object) -> torch.Tensor:
    """Images of a module.

    Raises:
        UserError: no float (N, C, H, W), or none of them.
    """
    import torch

    batch = images if isinstance(images, torch.Tensor) else torch.from_numpy(np.array(_array(images)))
    if batch.ndim != 4 or not batch.is_floating_point():
        raise UserError(
            f"images are {batch.dtype} {tuple(batch.shape)}; a module's must be float (N, C, H, W), normalised as it "
            "takes them (preprocessing.normalize)"
        )
    _some(batch)
    if not torch.isfinite(batch).all():
        raise UserError("images hold values that are not finite numbers")
    return batch.detach()


def _some(images: object) -> None:
    if not len(images):  # pyright: ignore[reportArgumentType] - an array or a tensor
        raise UserError("there are no images to explain; give at least one")
