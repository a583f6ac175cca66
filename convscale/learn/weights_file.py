"""A file of weights from elsewhere opened as if it were a checkpoint: its network by a name, its classes by its own."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from convscale.arch.spec import NetSpec
from convscale.errors import UserError
from convscale.learn.checkpoint import ORIGIN, Checkpoint
from convscale.networks.foreign import Foreign, build_foreign
from convscale.networks.names import network_of
from convscale.networks.pictures import preprocessing_of
from convscale.networks.resolve import Named
from convscale.nn.state_dicts import read_state_dict
from convscale.nn.weights import class_count, load_weights

NUMBERED = "numbered"
"""In a checkpoint's ``meta``: whether its classes are numbers because nothing names them."""


def names_of(checkpoint: Checkpoint, classes: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The names of a checkpoint's classes on data whose classes are these: its own, or the data's where nothing names
    them and there are as many; and a note on that.

    Raises:
        UserError: the data has others, or has them in another order.
    """
    if not checkpoint.meta.get(NUMBERED):
        if classes != checkpoint.classes:
            raise UserError(
                f"the data's classes {list(classes)} are not the checkpoint's {list(checkpoint.classes)}, in this order"
            )
        return classes, ""
    if len(classes) != len(checkpoint.classes):
        raise UserError(f"the data has {len(classes)} classes, {checkpoint.path} {len(checkpoint.classes)}")
    unlike = (
        ""
        if tuple(sorted(classes, key=_by_value)) == classes
        else "; timm puts numbers in names in the order of their values"
    )
    note = f"nothing names the classes of {checkpoint.path}: the data's are taken in their order, {', '.join(classes)}"
    return classes, note + unlike


def _by_value(name: str) -> list[tuple[int, str]]:
    """What timm sorts the names of folders by: numbers in them by their value, and case left out."""
    parts = re.split("([0-9]+)", name.lower())  # numbers stand at the odd places
    parts[1::2] = [part.lstrip("0") for part in parts[1::2]]
    return [(len(part) if place % 2 else 0, part) for place, part in enumerate(parts)]


def open_weights(path: Path, model: str | None = None) -> tuple[Checkpoint, list[str]]:
    """A network with the weights of a file, and notes on what was left out or changed.

    Args:
        path: a file of weights of any trainer.
        model: the network: a name, a spec's file or package.module:function; None: the one that the file names, as
            timm's trainer does.

    Raises:
        UserError: no network is named, the file holds no weights, they do not fit, or have no classifier.
    """
    source = read_state_dict(path)
    if not (name := model or source.model):
        raise UserError(f"{path} does not say what network its weights are of; name it (--model)")
    network = network_of(name)
    net = _build(network, 1000)
    classes = class_count(net, source)
    if not classes:
        load_weights(net, source.tensors, allow_head_mismatch=True)  # of another network: says what does not fit
        raise UserError(f"{path} has no classifier of {name}; train on from it (train --init)")
    net = net if classes == 1000 else _build(network, classes)
    loaded = load_weights(net, source.tensors)
    if loaded.adapted_stem:
        raise UserError(f"{path} was trained on images of another number of channels than {name} takes")
    named = len(source.classes) == classes
    names = source.classes if named else tuple(map(str, range(classes)))
    meta = {"untrained": f"{path}, weights of {name}", NUMBERED: not named}
    checkpoint = Checkpoint(net=net.eval(), classes=names, preprocessing=preprocessing_of(net), meta=meta, path=path)
    return checkpoint, loaded.notes()


def _build(network: Named, classes: int) -> nn.Module:
    if isinstance(network, Foreign):
        net = build_foreign(network, num_classes=classes)
        setattr(net, ORIGIN, network)
        return net
    from convscale.nn.net import create_model

    assert isinstance(network, NetSpec)
    return create_model(network, num_classes=classes)
