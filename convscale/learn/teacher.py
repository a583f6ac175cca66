"""A teacher for knowledge distillation: any network, on the student's inputs."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from convscale.conditions import sides
from convscale.errors import UserError, first_line
from convscale.images.preprocess import Preprocessing
from convscale.learn.checkpoint import load_checkpoint
from convscale.networks.foreign import Foreign, build_foreign
from convscale.networks.pictures import preprocessing_of
from convscale.networks.resolve import find
from convscale.nn.modes import as_it_was, evaluating
from convscale.nn.net import create_model


class Teacher(nn.Module):
    """Takes the student's inputs, float (N, C, H, W), and gives the teacher's logits; its own normalisation and image
    size are restored first.
    """

    factor: torch.Tensor
    shift: torch.Tensor

    def __init__(self, net: nn.Module, own: Preprocessing, student: Preprocessing) -> None:
        super().__init__()
        self.net, self.size = net, None if own.image_size == student.image_size else sides(own.image_size)
        mean, std, student_mean, student_std = (
            torch.tensor(values).view(1, -1, 1, 1) for values in (own.mean, own.std, student.mean, student.std)
        )
        self.register_buffer("factor", student_std / std)
        self.register_buffer("shift", (student_mean - mean) / std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.factor + self.shift
        if self.size is not None:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        return self.net(x)


def open_teacher(
    teacher: nn.Module | str | os.PathLike[str], classes: tuple[str, ...], student: Preprocessing
) -> nn.Module:
    """The teacher: a module as it is; or a checkpoint or, where no such folder exists, a network by its name with its
    released weights, each with its own preprocessing, without gradients.

    Whoever asks it for logits does so in eval mode.

    Raises:
        UserError: neither a checkpoint nor a network that has weights; other classes, or another number of channels.
    """
    if isinstance(teacher, nn.Module):
        return teacher
    if isinstance(teacher, str) and not Path(teacher).exists():
        net = _released(teacher)
        own = preprocessing_of(net)
    else:
        loaded = load_checkpoint(teacher)
        net, own = loaded.net, loaded.preprocessing
        if loaded.classes != classes:
            raise UserError(
                f"teacher {teacher} has classes {list(loaded.classes)}, the data {list(classes)}; they must be the "
                "same, in this order"
            )
    if own.channels != student.channels:
        raise UserError(f"teacher {teacher} takes {own.channels} channel(s), the data has {student.channels}")
    return Teacher(net, own, student).requires_grad_(False)


def _released(name: str) -> nn.Module:
    """A network by its name with released weights, an architecture's usual ones where it names none; a function of the
    user's brings its own.

    Raises:
        UserError: an unknown name, or its weights can not be had.
    """
    try:
        found = find(name)
    except UserError as error:
        raise UserError(f"teacher: checkpoint {name} does not exist, and as a network: {error}") from error
    if isinstance(found, Foreign):
        return build_foreign(found, pretrained=found.origin == "timm")
    return create_model(name, pretrained=True)


def check_teacher(teacher: nn.Module, classes: int, student: Preprocessing, device: torch.device) -> None:
    """See that a teacher answers the student's inputs, float32 under the caller's autocast, with logits of the data's
    classes; it is left as it was. One behind ``torch.compile`` is asked as it is behind that: compiled for two images
    it would take every other batch as of any size.

    Raises:
        UserError: it does not run, or gives something else.
    """
    inputs = torch.zeros(2, student.channels, student.height, student.width, device=device)
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            torch.random.fork_rng(devices=[]),
            as_it_was(teacher),
            evaluating(teacher),
            torch.no_grad(),
        ):
            outputs: object = teacher(inputs)
    except Exception as error:  # any code may be in it
        raise UserError(
            f"the teacher can not be run on the student's inputs, {tuple(inputs.shape)}: {first_line(error)}"
        ) from error
    if not isinstance(outputs, torch.Tensor):
        raise UserError(
            f"the teacher gives a {type(outputs).__name__}; it must give a tensor of logits, (N, {classes})"
        )
    if outputs.shape != (2, classes):
        raise UserError(
            f"the teacher gives {tuple(outputs.shape)} for two images; the data has {classes} classes, so it must be "
            f"(2, {classes})"
        )
