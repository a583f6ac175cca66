"""The training loop: one object that knows where a run stands, can save that, and can go on from it exactly."""

from __future__ import annotations

import copy
import math
import time
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import nn

from convscale.conditions import Size
from convscale.errors import UserError
from convscale.learn.agreeing import Agreeing
from convscale.learn.augment import mix_seed
from convscale.learn.bad_images import BadImages
from convscale.learn.compiling import Compiling
from convscale.learn.distributed import spread_over
from convscale.learn.ema import build_ema
from convscale.learn.freeze import Freezing
from convscale.learn.imitate import Where
from convscale.learn.inputs import network_inputs
from convscale.learn.job import Job
from convscale.learn.join import SHARES, between
from convscale.learn.keep import Waited, copied, copied_state, copy_into
from convscale.learn.loader import Batch
from convscale.learn.on_device import InTurn, chosen_algorithms, in_time
from convscale.learn.optim import build_optimizer, follow_layout, set_lr
from convscale.learn.probe import solve_head
from convscale.learn.record import Best, EpochRow, complete_row
from convscale.learn.run_folder import RunFolder
from convscale.learn.schedule import epoch_at, image_size_at, lr_factor
from convscale.learn.settings import AUTOCAST, told_of_lone_values
from convscale.learn.validate import Validation, validate

MAX_BAD_STEPS = 8
"""Steps in a row without a finite loss and gradient after which the run goes back to its last good state, at half the
learning rate."""
MAX_ROLLBACKS = 3
"""Times it may do that."""


class Trainer:
    """Runs a job. All that changes while it runs is in ``state()``."""

    steady = True
    """Every step uses the same parameters, but for those that the recipe freezes."""
    best_weights: Waited[dict[str, torch.Tensor]] = Waited()
    start_weights: Waited[dict[str, torch.Tensor]] = Waited()
    _good: Waited[dict[str, Any]] = Waited()

    def __init__(self, job: Job) -> None:
        self.job = job
        self.net = job.net
        self.freezing = Freezing(job.net, job.recipe)
        self.forward: nn.Module = job.net
        self.spread: nn.parallel.DistributedDataParallel | None = None
        if job.processes.world > 1:
            self.forward = self.spread = spread_over(job.net, job.recipe, steady=self.steady)
        self.compiling = Compiling(job.recipe.compile, self.forward, self._autocast, job.device, job.processes.world)
        self.forward = self.compiling.forward
        self.optimizer = build_optimizer(job.net, job.recipe)
        self.ema = build_ema(job.net, job.recipe, self.optimizer)
        self.agreeing = Agreeing(job)
        self.trouble = self.agreeing.trouble
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=job.settings.precision == "fp16")
        # whole groups of accumulated batches only
        self.steps_per_epoch = max(1, job.loader.steps_per_epoch // job.recipe.accumulate) * job.recipe.accumulate
        if self.steps_per_epoch > job.loader.steps_per_epoch:
            raise UserError(
                f"accumulate {job.recipe.accumulate} is more than the {job.loader.steps_per_epoch} batches of an epoch"
            )
        self.folder: RunFolder | None = None
        if job.output is not None and job.processes.first:
            self.folder = RunFolder(job, job.output, self.steps_per_epoch)
        self.epoch = self.step = 0  # the next step to take: batches done in this epoch
        self.updates = 0  # optimiser steps
        self.elapsed, self.lr_scale = 0.0, 1.0
        self.history: list[EpochRow] = []
        self.best: Best = {"metric": -1.0, "loss": math.inf, "epoch": 0, "thresholds": None, "temperatures": None}
        self.skipped = self.rollbacks = self._bad_in_row = 0
        self.stopped_early = False
        self.joins = 0  # the last weights were joined with those of the start
        self._bad_images = BadImages(job)
        self._told = set[str]()
        self._sums = {"loss": 0.0, "images": 0, "seconds": 0.0, "wait": 0.0}
        # running means and variances: forward changes them
        self._statistics = [buffer for buffer in job.net.buffers() if buffer.numel()]
        self._statistics_before = [buffer.clone() for buffer in self._statistics]
        self._saved_at, self._size = time.monotonic(), job.loader.image_size
        self.imitation = job.imitation(self._autocast)  # last: nothing may fail behind its hooks

    @property
    def watched(self) -> nn.Module:
        """The network that is validated and kept: the average when there is one."""
        return self.ema.net if self.ema is not None else self.net

    @property
    def graph(self) -> tuple[Size, bool]:
        """What compiled code is for: the present image size, and whether layers are frozen."""
        return self._size, self.freezing.frozen

    def run(self) -> None:
        """Train to the end (or until told to stop, with a state saved)."""
        recipe = self.job.recipe
        if recipe.join_start and self.start_weights is None and self.updates == 0:
            self.start_weights = copied(self.watched)
        while self.epoch < recipe.epochs and (self._position() < 1.0 or self.step):  # an epoch that began is validated
            if recipe.early_stop and self.step == 0 and self.epoch - self.best["epoch"] >= recipe.early_stop:
                self._note(f"stopped early: no better validation result for {recipe.early_stop} epochs")
                self.stopped_early = True
                break
            if self._good is None or (self.step == 0 and self._bad_in_row == 0):
                self._good = copied_state(self.state())
            with chosen_algorithms(self.job.device):
                told_to_stop = not self._run_epoch()
            if told_to_stop:
                return
        if recipe.join_start and self.start_weights is not None and not self.joins:
            self._join_with_start()

    def start_from_solved_head(self) -> None:
        """Solve the head on the present features; what that gives is the first result to beat."""
        started, job = time.perf_counter(), self.job
        if job.processes.first:
            with self.trouble.held():
                decay, _ = solve_head(
                    self.net,
                    job.loader.split,
                    job.validation,
                    job.preprocessing,
                    device=job.device,
                    workers=job.loader.asked_workers,
                )
                self._note(f"solved the head on the features of the weights it starts from (L2 penalty {decay:g})")
        self.trouble.settle()
        job.processes.share(self.net)
        if self.ema is not None:
            self.ema.net.load_state_dict(self.net.state_dict())
        result = self._validate()
        self._keep_if_better(result)
        self._note(f"before the first epoch: validation result {result.metric:.2%}")
        self.elapsed += job.processes.from_first(time.perf_counter() - started)
        self._save_best()

    def _join_with_start(self) -> None:
        """Try weights on the way from the start to the end; what is better is kept."""
        started, last = time.perf_counter(), copied(self.watched).wait()
        self.joins, before = 1, self.best_weights
        for share in SHARES:
            self.watched.load_state_dict(between(self.start_weights or last, last, share))
            if self._keep_if_better(self._validate()):
                self._note(f"better at {share:.0%} of the way from the start: {self.best['metric']:.2%}")
        if self.best_weights is not None and self.best_weights is not before:  # written once: all have one number
            self.watched.load_state_dict(self.best_weights)
            self._save_best()
        self.watched.load_state_dict(last)
        self.elapsed += self.job.processes.from_first(time.perf_counter() - started)
        self._save_state()

    # -- one epoch

    def _run_epoch(self) -> bool:
        """The rest of the current epoch; False when told to stop."""
        self.freezing.begin_epoch(self._position())
        epoch = epoch_at(self.epoch, self.elapsed, self.job.max_seconds, self.job.recipe)
        self._size = image_size_at(epoch, self.job.loader.image_size, self.job.recipe)
        source = self.job.loader.batches(self.epoch, self.step, self._size)
        with closing(in_time(source, self.job.device, several=self.spread is not None)) as batches:
            while self.step < self.steps_per_epoch and self._position() < 1.0:
                self.freezing.before_step(self._position())
                outcome = self._run_update(batches)
                if outcome == "rolled back":
                    return True
                if not self.agreeing.go_on():
                    self._save_state()
                    return False
                if self.job.output is not None and time.monotonic() - self._saved_at > self.job.checkpoint_seconds:
                    self._save_state()
        self._end_epoch()
        return True

    def _run_update(self, batches: InTurn) -> str:
        """Batches up to and including one optimiser step."""
        started = time.perf_counter()
        recipe, taken, losses, waited, images = self.job.recipe, list[torch.Tensor](), list[float](), 0.0, 0
        lr = recipe.lr * self.lr_scale * lr_factor(recipe, self._position(), float(recipe.epochs))
        set_lr(self.optimizer, lr)
        copy_into(self._statistics, self._statistics_before)
        shared = True  # the gradients that lie there are the mean of all processes
        for number in range(recipe.accumulate):
            before = time.perf_counter()
            batch = self.agreeing.next_of(batches)
            waited += time.perf_counter() - before
            self._tell_bad(batch.bad)
            with self.trouble.held():
                self._bad_images.count(batch.bad)
            if self.agreeing.have_images(batches, batch):
                # one exchange of gradients for the step, with the last batch
                shared = self.spread is None or number == recipe.accumulate - 1
                with nullcontext() if shared or self.spread is None else self.spread.no_sync():
                    taken.append(self._backward(batch))
                images += len(batch.indices)
            self.step += 1
            if self.step < self.steps_per_epoch:
                waited += batches.prepare()  # what was enqueued is being computed
        if not shared:  # the last batch had no image that could be read
            self.job.processes.average(self.net)
        if taken:
            good, losses = self._update(taken, batches, started)
            self.optimizer.zero_grad(set_to_none=True)
            if not good:
                copy_into(self._statistics_before, self._statistics)  # what is not finite must not stay in them
                if self._skip(losses, lr):
                    return "rolled back"
            if good:
                self._bad_in_row = 0
                self._sums["loss"] += sum(losses) / len(losses) * images
                self._sums["images"] += images
        else:
            self.agreeing.ask((), batches, time.perf_counter() - started)
        seconds = time.perf_counter() - started
        seconds += self.compiling.after(self, seconds, waited)
        self.elapsed += self.agreeing.spent(seconds)
        self._sums["seconds"] += seconds
        self._sums["wait"] += waited
        self._tell_step(losses, lr)
        return "done"

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Forward and backward of one batch; gives its loss, which nobody waits for yet."""
        job, recipe = self.job, self.job.recipe
        # dropout and stochastic depth: fixed by the step, so a resumed run needs no generator's state
        torch.manual_seed(mix_seed(4, job.seed, self.epoch, self.step, job.loader.rank))
        inputs, labels = network_inputs(job, batch, self.epoch, self.step)
        with self._autocast(), told_of_lone_values():
            outputs = self.forward(inputs)
        outputs = outputs.float()
        if outputs.ndim != 2 or outputs.shape[1] != len(job.loader.split.classes):
            raise UserError(
                f"the network gives outputs of shape {tuple(outputs.shape)}, the data has "
                f"{len(job.loader.split.classes)} classes"
            )
        loss = job.loss(outputs, labels)
        if self.imitation is not None:
            with self.trouble.held():  # its cache's disk may be full
                loss = self.imitation.added(loss, outputs, inputs, Where(epoch=self.epoch, indices=batch.indices))
        self.scaler.scale(loss / recipe.accumulate).backward()
        return loss.detach()

    def _update(self, taken: list[torch.Tensor], batches: InTurn, started: float) -> tuple[bool, list[float]]:
        """The optimiser's step, and the losses as numbers; False when one, or a gradient, is not finite.

        This is where the device is waited for, once a step. A loss that is not finite has no finite gradient, and the
        processes' gradients are one: all take the step or none does.
        """
        recipe = self.job.recipe
        self.scaler.unscale_(self.optimizer)
        grads = [param.grad for param in self.net.parameters() if param.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        seconds = time.perf_counter() - started
        right, (length, *losses) = self.agreeing.ask([norm.float(), *taken], batches, seconds)
        finite = right and math.isfinite(length)
        if finite and recipe.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.net.parameters(), recipe.clip_norm, norm)
        if finite or self.scaler.is_enabled():  # the scaler leaves the step out itself, and lowers its scale
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if finite:
            self.updates += 1
            if self.ema is not None and self.updates % recipe.ema_every == 0:
                self.ema.update(self.net, recipe.ema_every)
        # A scale that is still being sought is no bad step; without a scaler it is 1.
        return finite or (right and self.scaler.get_scale() > 1), losses

    def _skip(self, losses: list[float], lr: float) -> bool:
        """Count a step that could not be taken; True when the run went back to its last good state."""
        self.skipped += 1
        self._bad_in_row += 1
        if self._bad_in_row < MAX_BAD_STEPS:
            return False
        cause = f"no finite loss or gradient for {MAX_BAD_STEPS} steps in epoch {self.epoch + 1} "
        cause += f"(loss {losses[-1]:g}, learning rate {lr:g})"
        if self.rollbacks >= MAX_ROLLBACKS:
            raise UserError(
                f"training stopped: {cause}, {MAX_ROLLBACKS} times over with ever lower rates; a lower lr or "
                "clip_norm=1 would be right"
            )
        assert self._good is not None
        rollbacks, lr_scale, skipped, elapsed = self.rollbacks + 1, self.lr_scale / 2, self.skipped, self.elapsed
        self.restore(copy.deepcopy(self._good))
        self.rollbacks, self.lr_scale, self.skipped, self.elapsed = rollbacks, lr_scale, skipped, elapsed
        self._note(f"{cause}: back to the start of epoch {self.epoch + 1} at half the learning rate")
        if self.folder is not None:
            with self.trouble.held():
                self.folder.go_back(self.batches(), self.watched, self.metrics(), self.state())
        return True

    def _end_epoch(self) -> None:
        """Validate, note what is best, save."""
        started = time.perf_counter()
        sums = dict(self._sums)
        sums["loss"], sums["images"] = self.job.processes.sum([sums["loss"], sums["images"]])
        images = max(1, int(sums["images"]))
        self._tell_bad(self._bad_images.joined())
        result = self._validate()
        self.elapsed += self.job.processes.from_first(self.agreeing.rest() + time.perf_counter() - started)
        self.epoch, self.step = self.epoch + 1, 0
        self._keep_if_better(result)
        row: EpochRow = {
            "epoch": self.epoch,
            "train_loss": sums["loss"] / images if sums["images"] else math.nan,
            "val_loss": result.loss,
            "val_top1": result.top1,
            "val_map": result.average_precision,
            "lr": self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["lr_scale"],
            "images": images,
            "train_seconds": sums["seconds"],
            "images_per_s": images / max(sums["seconds"], 1e-9),
            "wait_share": sums["wait"] / max(sums["seconds"], 1e-9),
            "seconds": self.elapsed,
            "skipped_steps": self.skipped,
        }
        self.history.append(row)
        self._sums = dict.fromkeys(sums, 0.0)
        if self.folder is not None:
            if self.best["epoch"] == self.epoch:
                self._save_best()
            self._save_state(anew=True)
            with self.trouble.held():
                self.folder.write_log(self.history)
        self.job.progress(
            {
                "kind": "epoch",
                **row,
                "epochs": self.job.recipe.epochs,
                "best": self.best["metric"],
                "seconds_left": self._seconds_left(),
            }
        )

    def _validate(self) -> Validation:
        job = self.job
        result = validate(
            self.watched,
            job.validation,
            job.preprocessing,
            processes=job.processes,
            device=job.device,
            precision=job.settings.precision,
            workers=job.loader.asked_workers,
            beta=job.recipe.threshold_beta,
            max_bad_rate=job.max_bad_rate,
        )
        self._tell_bad(result.bad)
        return result

    def _keep_if_better(self, result: Validation) -> bool:
        """Note a validation result that beats all before it; one with a loss that is not finite never does.

        Of equal results the one with the lower loss is better, but a trained network is better than the solved head
        that it began with: what is trained on smoothed labels has a higher loss by nature.
        """
        better = (result.metric, -result.loss) > (self.best["metric"], -self.best["loss"])
        if self.best["epoch"] == 0 < self.epoch:
            better = result.metric >= self.best["metric"]
        if better := math.isfinite(result.loss) and better:
            self.best = {
                "metric": result.metric,
                "loss": result.loss,
                "epoch": self.epoch,
                "thresholds": None if result.thresholds is None else list(result.thresholds),
                "temperatures": None if result.temperatures is None else list(result.temperatures),
            }
            self.best_weights = copied(self.watched)
        return better

    # -- what is written and restored

    def state(self) -> dict[str, Any]:
        """Everything that changes while training; tensors are not copied."""
        return {
            "net": self.net.state_dict(),
            "ema": None if self.ema is None else {"net": self.ema.net.state_dict(), "updates": self.ema.updates},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best_weights": self.best_weights,
            "start_weights": None if self.joins else self.start_weights,
            "numbers": {
                "epoch": self.epoch,
                "step": self.step,
                "updates": self.updates,
                "elapsed": self.elapsed,
                "history": self.history,
                "best": self.best,
                "lr_scale": self.lr_scale,
                "skipped": self.skipped,
                "rollbacks": self.rollbacks,
                "sums": self._sums,
                "bad_in_row": self._bad_in_row,
                "bad_images": list(self._bad_images.known),
                "joins": self.joins,
                **self.compiling.record(),
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what ``state()`` gave."""
        self.net.load_state_dict(state["net"])
        if self.ema is not None:
            self.ema.net.load_state_dict(state["ema"]["net"])
            self.ema.updates = state["ema"]["updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        follow_layout(self.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.best_weights, self.start_weights = state["best_weights"], state.get("start_weights")
        numbers = state["numbers"]
        self.joins, self.forward = numbers.get("joins", 0), self.compiling.go_on(numbers.get("compile"))
        self.epoch, self.step, self.updates, self.elapsed = (
            numbers[key] for key in ("epoch", "step", "updates", "elapsed")
        )
        whole = self.job.recipe.batch_size * self.job.processes.world * self.steps_per_epoch
        self.history = [complete_row(row, whole) for row in numbers["history"]]
        best, self.lr_scale = numbers["best"], numbers["lr_scale"]
        self.best = {key: best.get(key) for key in Best.__annotations__}  # pyright: ignore[reportAttributeAccessIssue]
        self.skipped, self.rollbacks, self._bad_in_row = numbers["skipped"], numbers["rollbacks"], numbers["bad_in_row"]
        self._sums, self._bad_images.known = dict(numbers["sums"]), dict.fromkeys(numbers["bad_images"])
        self._told |= self._bad_images.known.keys()

    def _save_state(self, *, anew: bool = False) -> None:
        if self.folder is None or self._bad_in_row:  # running statistics may hold NaN while steps are being skipped
            return
        with self.trouble.held():
            self.folder.save_state(self.batches(), self.watched, self.metrics(), self.state(), anew=anew)
        self._saved_at = time.monotonic()

    def _save_best(self) -> None:
        if self.folder is not None:
            with self.trouble.held():
                self.folder.save_best(self.batches(), self.watched, self.metrics())

    def metrics(self) -> dict[str, object]:
        """What a checkpoint says of the run so far."""
        return {
            "history": self.history,
            "best": self.best,
            "epoch": self.epoch,
            "seconds": self.elapsed,
            "skipped_steps": self.skipped,
            **self.compiling.record(),
        }

    def batches(self) -> int:
        """Batches done since the run's start, and one more for what comes after the last."""
        return self.epoch * self.steps_per_epoch + self.step + self.joins

    # -- small helpers

    def _position(self) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        done = (self.epoch + self.step / self.steps_per_epoch) / self.job.recipe.epochs
        return done if self.job.max_seconds is None else max(done, self.elapsed / self.job.max_seconds)

    def _seconds_left(self) -> float:
        done = self._position()
        return self.elapsed * (1 - done) / done if done > 0 else 0.0

    def _autocast(self) -> torch.autocast:
        where, precision = self.job.device.type, self.job.settings.precision
        return torch.autocast(where, AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST)

    def _tell_bad(self, bad: tuple[str, ...]) -> None:
        for problem in bad:
            if problem not in self._told:
                self._told.add(problem)
                self._note(f"left out: {problem}")

    def _tell_step(self, losses: list[float], lr: float) -> None:
        seconds = max(self._sums["seconds"], 1e-9)
        self.job.progress(
            {
                "kind": "step",
                "epoch": self.epoch + 1,
                "epochs": self.job.recipe.epochs,
                "step": self.step,
                "steps": self.steps_per_epoch,
                "loss": losses[-1] if losses else math.nan,
                "lr": lr,
                "images_per_s": self._sums["images"] / seconds,
                "wait_share": self._sums["wait"] / seconds,
                "seconds_left": self._seconds_left(),
                "best": self.best["metric"] if self.best_weights is not None else None,
            }
        )

    def _note(self, text: str) -> None:
        self.job.progress({"kind": "note", "text": text})
