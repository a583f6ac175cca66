"""The training loop on pictures with boxes: the loop of ``learn``, with a detector's losses and mAP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch

from convscale.detect.boxes import BoxSplit
from convscale.detect.evaluate import answers, judged_by_coco
from convscale.detect.loader import BoxBatch
from convscale.learn.augment import mix_seed
from convscale.learn.distributed import Trouble
from convscale.learn.job import Job
from convscale.learn.keep import copied
from convscale.learn.loader import Batch, check_bad_rate
from convscale.learn.loop import Trainer
from convscale.learn.settings import told_of_lone_values
from convscale.learn.validate import Validation
from convscale.ship.box_metrics import Found


class DetectionTrainer(Trainer):
    """Runs a job whose loader gives ``BoxBatch``; everything that is saved and restored is the base's."""

    steady = False  # pictures without boxes leave out parts of a detector

    def __init__(self, job: Job, validation: BoxSplit, eval_batch: int) -> None:
        super().__init__(job)
        self.boxes, self.eval_batch = validation, eval_batch

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Forward and backward of one batch; gives the sum of the losses."""
        job = self.job
        torch.manual_seed(mix_seed(4, job.seed, self.epoch, self.step, job.loader.rank))
        images = batch.images.to(job.device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
        targets = [
            {name: value.to(job.device, non_blocking=True) for name, value in each.items()}
            for each in cast(BoxBatch, batch).targets
        ]
        with self._autocast(), told_of_lone_values():
            losses = self.forward(list(images), targets)
        loss = torch.stack([each.float() for each in losses.values()]).sum()
        self.scaler.scale(loss / job.recipe.accumulate).backward()
        return loss.detach()

    def _validate(self) -> Validation:
        """COCO's mean average precision, each process on its share of the pictures."""
        job, whole = self.job, self.boxes
        own = range(job.processes.rank, len(whole), job.processes.world)
        found, own_bad, trouble = list[Found | None](), list[str](), Trouble(job.processes)
        with trouble.held():
            found, own_bad = answers(
                self.watched,
                whole.subset(own),
                image_size=job.preprocessing.width,
                batch_size=self.eval_batch,
                device=job.device,
                precision=job.settings.precision if job.device.type == "cuda" else "fp32",
                workers=job.loader.workers,
            )
        trouble.settle()
        every: list[Sequence[Found | None]] = job.processes.gather(found)
        merged: list[Found | None] = [None] * len(whole)
        for rank, part in enumerate(every):
            for at, each in zip(range(rank, len(whole), job.processes.world), part, strict=True):
                merged[at] = each
        bad = tuple(problem for each in job.processes.gather(own_bad) for problem in each)
        check_bad_rate(bad, len(whole), job.max_bad_rate, whole.split)
        self._tell_bad(bad)
        metrics = judged_by_coco(whole, merged)
        value = 0.0 if math.isnan(metrics.map) else metrics.map
        top = 0.0 if math.isnan(metrics.ap50) else metrics.ap50
        # a detector has no loss outside training: the metric alone decides
        return Validation(loss=math.nan, top1=top, average_precision=value, bad=bad)

    def _keep_if_better(self, result: Validation) -> bool:
        """Note a validation result that beats all before it."""
        if better := result.metric > self.best["metric"]:
            self.best = {**self.best, "metric": result.metric, "loss": math.inf, "epoch": self.epoch}
            self.best_weights = copied(self.watched)
        return better
