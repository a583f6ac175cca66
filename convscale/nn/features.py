"""What feature maps a network gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from convscale.arch.spec import NetSpec
from convscale.errors import UserError


@dataclass(frozen=True)
class FeatureInfo:
    """Channels, reductions (pixels of the image per pixel of the map, along one side) and module names of feature maps,
    shallowest first.
    """

    maps: tuple[tuple[int, int, str], ...]

    @staticmethod
    def of(spec: NetSpec) -> FeatureInfo:
        """All taps of ``spec``."""
        maps, reduction = [], spec.stem.reduction
        if spec.stem.tap:
            maps.append((spec.stem.widths[-1], spec.stem.stride, "stem"))
        for i, stage in enumerate(spec.stages):
            reduction *= stage.stride
            if stage.tap:
                maps.append((stage.width, reduction, f"stages.{i}"))
        return FeatureInfo(tuple(maps))

    def select(self, indices: Sequence[int]) -> FeatureInfo:
        """Only these maps."""
        return FeatureInfo(tuple(self.maps[i] for i in indices))

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [channels for channels, _, _ in self.maps]

    def reduction(self) -> list[int]:
        """Pixels of the image per pixel of each map, along one side."""
        return [reduction for _, reduction, _ in self.maps]

    def module_name(self) -> list[str]:
        """The child whose output each map is."""
        return [name for _, _, name in self.maps]

    def __len__(self) -> int:
        return len(self.maps)


def resolve_indices(indices: int | Sequence[int] | None, count: int, name: str = "out_indices") -> list[int]:
    """Indices of ``count`` maps as a sorted list without repeats: None is all, an int the last that many, negative ones
    count from the end.

    Raises:
        UserError: an index outside, none at all, or no whole number.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int) and not isinstance(indices, bool):
        if not 1 <= indices <= count:
            raise UserError(f"{indices} feature maps were asked for; the network has {count}")
        return list(range(count - indices, count))
    if isinstance(indices, str) or not isinstance(indices, Sequence):
        raise UserError(f"{name} is {indices!r}; it must be a whole number or a list of them")
    for i in indices:
        if isinstance(i, bool) or not isinstance(i, int):
            raise UserError(f"{name} holds {i!r}; it must hold whole numbers")
        if not -count <= i < count:
            raise UserError(f"feature map {i} was asked for; the network has maps 0 to {count - 1}")
    out = sorted({i % count for i in indices})
    if not out:
        raise UserError(f"{name} is empty; name at least one feature map")
    return out
