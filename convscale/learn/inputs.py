"""A batch as the network takes it: on the device, normalised, erased and mixed as the recipe says."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from convscale.learn.augment import erase, mix, mix_seed
from convscale.learn.job import Job
from convscale.learn.loader import Batch


def network_inputs(job: Job, batch: Batch, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (N, C, H, W) in the run's layout, and labels: as in the split, or shares (N, classes) where images are
    mixed. Every random choice depends on the seed, the epoch and the step or the image alone.
    """
    recipe = job.recipe
    inputs = job.preprocessing.normalize(batch.images.to(job.device, non_blocking=True))
    inputs = inputs.contiguous(
        memory_format=torch.channels_last if job.settings.layout == "nhwc" else torch.contiguous_format
    )
    labels = batch.labels.to(job.device, non_blocking=True)
    if recipe.erase:
        seeds = [mix_seed(5, job.seed, epoch, index) for index in batch.indices.tolist()]
        inputs = erase(inputs, seeds, chance=recipe.erase)
    if recipe.mixup or recipe.cutmix:
        if recipe.partial == "negative" and labels.ndim == 2:
            labels = labels.nan_to_num()  # mixed with NaN, another image's label would be none either
        targets = labels if labels.ndim == 2 else F.one_hot(labels, len(job.loader.split.classes)).float()
        random = np.random.Generator(np.random.Philox(key=mix_seed(6, job.seed, epoch, step, job.loader.rank)))
        inputs, labels = mix(inputs, targets, random, mixup=recipe.mixup, cutmix=recipe.cutmix)
    return inputs, labels
