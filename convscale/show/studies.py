"""Two comparisons that the papers invite: their own four networks on a V100, and TResNet's ingredients one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from convscale import words
from convscale.arch.families.tresnet import tresnet
from convscale.arch.spec import NetSpec
from convscale.choice.basis import device_title
from convscale.show.speed_points import SpeedPoint, from_prediction, from_record
from convscale.show.speed_sections import Comparison
from convscale.show.stated import Conditions
from convscale.speed.records import Record

SOURCE = (
    "TResNet (Ridnik et al., arXiv 2003.13630, table 1): NVIDIA V100, mixed precision, at 90 % of the largest batch "
    "that fits"
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of the paper's table."""

    name: str
    """Our name of the network."""
    image_size: int
    """Side of the input in pixels."""
    infer: float
    """Images/s of inference."""
    train: float
    """Images/s of training."""
    train_batch: int | None
    """Largest batch that fits in training; None where the paper has none."""


PAPER = (
    Published(name="resnet50", image_size=224, infer=2830, train=805, train_batch=288),
    Published(name="tresnet_m", image_size=224, infer=2930, train=730, train_batch=512),
    Published(name="efficientnet_b1", image_size=240, infer=2740, train=440, train_batch=196),
    Published(name="mixnet_l", image_size=224, infer=1400, train=400, train_batch=None),
)
"""Source: ``SOURCE``."""

ABLATION: dict[str, NetSpec] = {
    "TResNet-M": tresnet("tresnet_m", (3, 4, 11, 3), 64),
    "stem: 7x7 convolution and max-pool": tresnet("tresnet_m_conv_stem", (3, 4, 11, 3), 64, space_to_depth=False),
    "blur: none, plain strides": tresnet("tresnet_m_no_blur", (3, 4, 11, 3), 64, blur=False),
    "norm: BatchNorm and leaky ReLU": tresnet("tresnet_m_batchnorm", (3, 4, 11, 3), 64, norm="batchnorm"),
    "blocks: bottleneck in all stages": tresnet("tresnet_m_bottleneck", (3, 4, 11, 3), 64, kinds=("bottleneck",) * 4),
    "SE: in no stage": tresnet("tresnet_m_no_se", (3, 4, 11, 3), 64, se_stages=()),
    "SE: in all four stages": tresnet("tresnet_m_all_se", (3, 4, 11, 3), 64, se_stages=(0, 1, 2, 3)),
}
"""TResNet-M with one ingredient changed at a time."""


def papers_example(batch_size: int = 256) -> Comparison:
    """The papers' four networks on a V100: published beside predicted, inference and training.

    Args:
        batch_size: of the predictions for inference, and of those for training where the paper gives no batch; else 90
            % of the paper's largest.
    """
    from convscale.cost.counting import count
    from convscale.predictor.predict import predict

    points, labels = [], []
    for row in PAPER:
        cost = count(row.name, row.image_size)
        labels.append(f"{words.large(cost.params)} params, {words.large(cost.macs)} MACs, {row.image_size} px")
        for mode, speed in (("infer", row.infer), ("train", row.train)):
            batch = batch_size if mode == "infer" or row.train_batch is None else int(0.9 * row.train_batch)
            guess = predict(
                row.name, device="v100", mode=mode, precision="amp", image_size=row.image_size, batch_size=batch
            )
            stated = replace(Conditions.of(guess.conditions.to_dict()), batch_size=None)
            points.append(
                SpeedPoint(
                    name=row.name,
                    kind="published",
                    images_per_s=speed,
                    device=device_title("v100"),
                    conditions=stated,
                    notes=(SOURCE,),
                )
            )
            points.append(from_prediction(row.name, guess))
    return Comparison(
        title="The papers' example on a V100",
        points=points,
        baseline="resnet50",
        labels=labels,
        intro=(
            "MACs do not tell the speed: EfficientNet-B1 has a sixth of ResNet50's and trains at about half its speed. "
            "Published beside predicted."
        ),
    )


def tresnet_ablation(
    devices: Sequence[str] = ("v100", "rtx-4090"), records: Iterable[Record] = (), *, batch_size: int = 128
) -> Comparison:
    """TResNet-M with one ingredient changed at a time: predicted for GPUs, measured where there are records.

    Args:
        devices: named GPUs to predict for, inference under AMP.
        records: measurements of the specs in ``ABLATION``, by the spec's name; of several under the same conditions the
            last counts.
    """
    from convscale.cost.counting import count
    from convscale.predictor.predict import predict

    points, labels = [], []
    measured = {(point.name, point.setting): point for point in map(from_record, records)}
    for line, spec in ABLATION.items():
        cost = count(spec)
        labels.append(f"{words.large(cost.params)} params, {words.large(cost.macs)} MACs")
        for device in devices:
            guess = predict(
                spec, device=device, mode="infer", precision="amp", image_size=spec.input.size, batch_size=batch_size
            )
            points.append(_named(from_prediction(spec.name, guess), line))
        points.extend(_named(point, line) for (name, _), point in measured.items() if name == spec.name)
    return Comparison(
        title="TResNet's ingredients",
        points=points,
        baseline="TResNet-M",
        relative=True,
        labels=labels,
        intro=(
            "TResNet-M with one ingredient changed at a time. What pays on one device may cost on another; this is "
            "about speed only, not accuracy."
        ),
    )


def _named(point: SpeedPoint, name: str) -> SpeedPoint:
    """The point under the line that describes it; without the accuracy of released weights, which are of another
    network.
    """
    return replace(point, name=name, family="tresnet", top1=None, weights="", accuracy_source="")
