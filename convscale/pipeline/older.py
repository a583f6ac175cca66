"""What a run of ``fit`` was known by in version 0.1."""

from __future__ import annotations

from convscale.arch.spec import NetSpec
from convscale.choice.candidates import sized
from convscale.conditions import Conditions
from convscale.images.splits import DataSplits
from convscale.pipeline.request import BRIEF_EPOCHS, FitRequest
from convscale.predictor.fitted import MEASURED_BATCH
from convscale.runtimes.base import file_runtimes


def as_version_0_1(asked: FitRequest, splits: DataSplits) -> dict[str, object] | None:
    """What ``to_json`` gave in version 0.1, so that its runs are resumed; None for a request that it did not know: its
    own grid of scaled members is gone.
    """
    where, training = asked.where, asked.training
    if asked.named is None or not asked.here or any(not isinstance(item, NetSpec) for item in asked.named):
        return None
    batch = MEASURED_BATCH if where.batch_size is None else where.batch_size
    cond = Conditions(
        device=where.device,
        precision=where.precision or "fp32",
        batch_size=batch,
        runtime=asked.shipping.runtime or file_runtimes()[0],
        threads=where.threads,
    )
    recipe = asked.recipe_for(splits, pretrained=training.init is not None)
    if recipe == "small" and training.recipe is None and splits.train.images is None:
        recipe = "pictures"  # files were not looked at
    specs = [sized(item, asked.image_size) for item in asked.named if isinstance(item, NetSpec)]
    return {
        "data": str(asked.data) if not isinstance(asked.data, DataSplits) else "given splits",
        "min_throughput": asked.constraint.min_throughput,
        "conditions": cond.to_dict(),
        "shipping": asked.shipping.to_json(),
        "candidates": [spec.to_dict() for spec in specs],
        "recipe": recipe,
        "init": training.init,
        "overrides": training.overrides,
        "epochs": training.checked_epochs(recipe),
        "brief_epochs": training.brief_epochs or BRIEF_EPOCHS,
        "seed": training.seed,
    }
