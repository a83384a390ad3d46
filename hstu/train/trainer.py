"""The training run: restore, train, log, evaluate and save until the last iteration."""

from __future__ import annotations

import gc
import logging
import math
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from shlex import quote
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from hstu.base.errors import ConfigError
from hstu.base.shipped import command
from hstu.checkpoint.phase import Phase
from hstu.checkpoint.state import TrainState
from hstu.checkpoint.store import CheckpointStore
from hstu.config.args import LRScheduleArgs, RankingArgs, TrainerArgs
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.sampling.splits import Split
from hstu.observe.logging import format_eval, format_train, progress_bar
from hstu.observe.records import EvalRecord, Throughput, TrainRecord
from hstu.observe.run_directory import RunDirectory
from hstu.observe.throughput import SLOW_BY, FlopCounter, Profiler, ThroughputMeter, memory_bytes
from hstu.optim.optimizers import lr_multiplier
from hstu.parallel.collectives import gather_copies, sum_over_ranks
from hstu.parallel.dynamic.table import describe_report, pop_reports
from hstu.parallel.mesh import Mesh
from hstu.parallel.own_time import own_time
from hstu.parallel.tables import dynamic_tables
from hstu.pipeline.finite import NonFiniteStep, Stopped, StopSignal
from hstu.pipeline.pipelines import TrainPipeline
from hstu.train.batch_source import BatchSource
from hstu.train.evaluate import Evaluator
from hstu.train.history import MetricsHistory, RunningLoss, Selection
from hstu.train.intervals import Intervals

log = logging.getLogger(__name__)


def total_iters(args: TrainerArgs, batches_per_epoch: int) -> int:
    """Iterations of the whole run: max_train_iters, or num_train_epochs passes over the data, or one pass."""
    if args.max_train_iters is not None:
        return args.max_train_iters
    # Rounding first: 0.7 epochs of 10 batches are 7 iterations, though 0.7 * 10 is 7.000000000000001.
    return max(1, math.ceil(round((args.num_train_epochs or 1.0) * batches_per_epoch, 6)))


@dataclass
class Trainer:
    """All parts of a run, built by hstu.train.builder. ``train`` runs it."""

    config: RunConfig
    mesh: Mesh
    source: BatchSource
    pipeline: TrainPipeline
    evaluator: Evaluator
    checkpoints: CheckpointStore
    state: TrainState
    run_directory: RunDirectory
    meter: ThroughputMeter

    def __post_init__(self) -> None:
        self._begun = time.monotonic()
        self.args, task = self.config.trainer, self.config.task_args
        self.phase = self.source.phase
        self.total_iters = self.phase.first_iteration + total_iters(self.args, self.source.batches_per_epoch)
        self.flop_counter = FlopCounter(self.config.network, self.source.roles)
        self._shift = 0
        """Iterations of the phase so far beyond those that batches of this run's size would need for its samples."""
        self._running_loss = RunningLoss(self.mesh.device, task.loss_names if isinstance(task, RankingArgs) else ())
        self._history = MetricsHistory()
        self._loss_scale = self.pipeline.step.loss_scale
        self.state.carried_in_phase |= {"history": self._history, "running_loss": self._running_loss}
        if self._loss_scale is not None:
            self.state.carried["loss_scale"] = self._loss_scale
        self._grad_norms: Mapping[str, Tensor] = {}
        args, split = self.args, next(iter(self.source.eval_splits), "none")
        self._selection = Selection(args.best_metric, args.best_metric_mode, split, args.early_stop_patience)
        self._last_throughput: Throughput | None = None
        self._has_best_weights = False
        """Whether the weights are no longer those of ``state.iteration``, and must not be saved."""
        self._stop = StopSignal(self.mesh, self.pipeline.step.check)
        self.evaluator.between_batches = self._stop.raise_if_received
        intervals = {
            "log": args.log_interval,
            "evaluation": args.eval_interval if self.source.eval_splits else None,
            "checkpoint": args.ckpt_save_interval if args.saves_checkpoints else None,
        }
        self._intervals = Intervals(intervals)
        if self._intervals.has_state:
            self.state.carried["intervals"] = self._intervals

    def train(self) -> None:
        """Train to the last iteration, early stopping or a stop signal; the summary gives the reason."""
        self._stop.install()
        if self.args.gc_interval:
            gc.disable()
        status, begun = "failed", False
        try:
            self._restore()
            begun = True
            try:
                if self.args.eval_at_start or self._missed_evaluation():
                    self.evaluate(self.source.eval_splits)
                self._train_loop()
                if self.args.eval_at_end:
                    self._evaluate_at_end()
                ended = "done" if self.state.iteration == self.total_iters else "stopped early"
            except Stopped as stopped:
                log.warning("%s: stopping after iteration %d", stopped, self.state.iteration)
                self._save()
                ended = "stopped"
            with self.mesh.heartbeat.during("saving a checkpoint"):
                self.checkpoints.wait()
                self.checkpoints.finish_uploads()
            status = ended
        except NonFiniteStep as error:
            self.state.iteration = error.iteration - 1  # on a GPU the bad step may already be counted
            raise
        finally:
            gc.enable()
            if not self.checkpoints.is_saving:
                self.checkpoints.close()
            if begun:
                self._summarise(status)
            else:
                self.run_directory.discard()
            self._stop.uninstall()

    def _restore(self) -> None:
        with self.mesh.heartbeat.during("restoring a checkpoint"):
            self.checkpoints.restore(self.state)
        self._intervals.resume(self.state.iteration)
        self._follow_samples()
        self._check_length()
        self._selection.follow(self._history)

    def _follow_samples(self) -> None:
        """Count epochs and schedules by samples where the checkpoint had global batches of another size."""
        iteration, position = self.state.iteration, self.state.position
        if position == self.phase.start:
            return
        done = self.source.train_sampler(position).batches_since(self.phase.first_epoch)
        self._shift = iteration - self.phase.first_iteration - done
        if self._shift and self.args.max_train_iters is None:
            self.total_iters += self._shift
            log.warning(
                "global batches have another size than those of the checkpoint: its %d iterations count as %d of this "
                "run, and %d are left to train",
                iteration, iteration - self._shift, self.total_iters - iteration,
            )  # fmt: skip

    def _check_length(self) -> None:
        iteration, total = self.state.iteration, self.total_iters
        if iteration > total:
            option = "max_train_iters" if self.args.max_train_iters is not None else "num_train_epochs"
            raise ConfigError(
                f"TrainerArgs.{option}: the run would end after iteration {total}, but the checkpoint that it resumes "
                f"from has done {iteration}. Set it higher, or load an earlier checkpoint (ckpt_load_dir)."
            )
        if iteration == total:
            log.info("the checkpoint has done all %d iterations: nothing is left to train", total)
        elif self.phase != Phase():
            log.info("a phase of its own: iterations %d to %d", self.phase.first_iteration, total)

    def _train_loop(self) -> None:
        batches = self.meter.timed(self._load(self.source.train_batches(self.state.position)))
        args = self.args
        profiler = Profiler(self.run_directory.path, args, self.mesh.rank)
        bar = progress_bar(self.total_iters, args.progress_bar, visible=self.mesh.is_main, initial=self.state.iteration)
        with profiler, bar:
            while self.state.iteration < self.total_iters and not self._selection.is_exhausted:
                profiler.step(self.state.iteration)
                self._train_step(batches)
                bar.update()
                self._after_step(bar)
                self.checkpoints.poll()
                self._stop.raise_if_agreed()
        self.pipeline.resolve()

    def _load(self, batches: Iterator[HSTUBatch]) -> Iterator[HSTUBatch]:
        while True:
            with self.mesh.heartbeat.during("loading a batch"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _train_step(self, batches: Iterator[HSTUBatch]) -> None:
        self.mesh.heartbeat.mark("training step", self.state.iteration + 1)
        own = self.config.table_schedule
        of_tables = None if own is None else self._lr_multiplier(own)
        self.state.optimizers.set_lr_multiplier(self._lr_multiplier(self.config.schedule), of_tables)
        following = self.state.iteration + 1
        is_logged = following == self.total_iters or self._intervals.may_be_due("log", following)
        self.pipeline.step.measures_norms = is_logged
        result = self.pipeline.progress(batches)
        before = self._epochs_of(self.state.position)
        self.state.iteration += 1
        self._grad_norms = result.grad_norms
        self.state.position = result.batch.position or SamplerPosition()  # hand-made batches have no position
        self._intervals.after_step(self.state.iteration, before, self._epochs_of(self.state.position))
        self._running_loss.add(result.losses)
        tokens, flops = self.flop_counter.count(result.batch)
        self.meter.add(samples=result.batch.real_batch_size, tokens=tokens, flops=flops)

    def _epochs_of(self, position: SamplerPosition) -> Fraction:
        return position.epoch + Fraction(position.consumed, max(1, len(self.source.train_lengths.items)))

    def _lr_multiplier(self, schedule: LRScheduleArgs) -> float:
        """Multiplier of a schedule for the next step, which counts as the phase and the size of batches say."""
        position, per_epoch = self.state.position, self.source.batches_per_epoch
        epoch = position.epoch + (position.consumed == len(self.source.train_lengths.items))  # of the next batch
        phase = self.phase
        epoch_start = phase.first_iteration + (epoch - phase.first_epoch) * per_epoch
        before, epochs_before = self._shift if self.args.max_train_iters is None else 0, 0
        if schedule.counts_from == "phase":
            before, epochs_before = before + phase.first_iteration, phase.first_epoch
            epoch_start -= phase.first_iteration
        iteration, total = self.state.iteration - before, self.total_iters - before
        return lr_multiplier(schedule, iteration, total, epoch - epochs_before, epoch_start)

    def _after_step(self, bar: tqdm[Any]) -> None:
        iteration, args = self.state.iteration, self.args
        last = iteration == self.total_iters
        due = self._intervals.due
        if "log" in due or last:
            self._log(bar)
        if "evaluation" in due and not (last and args.eval_at_end):
            self.evaluate(self.source.eval_splits)
        if self._selection.is_exhausted and not last:
            last = True
            log.info(
                "%s has been at its best at iteration %s: stopping early", args.best_metric, self._selection.iteration
            )
            if self._running_loss.steps:
                self._log(bar)
        if "checkpoint" in due or (last and args.save_at_end):
            self._save()
        if args.gc_interval and iteration % args.gc_interval == 0:
            gc.collect()

    def _log(self, bar: tqdm[Any]) -> None:
        self.pipeline.resolve()
        loss, task_losses = self._running_loss.pop()
        group = self.mesh.world_group
        rates = self.meter.take(
            own_time.pop_s(), lambda own: gather_copies(torch.tensor(own, dtype=torch.float64), group).tolist()
        )
        self._last_throughput = rates
        straggler = None
        if rates.ranks.get("slowest_excess", 0.0) >= SLOW_BY:
            straggler = f"rank {rates.ranks['slowest_rank']} ({self._host_of(int(rates.ranks['slowest_rank']))})"
        scale, optimizers = self._loss_scale, self.state.optimizers
        norms: dict[str, Any] = {name: float(norm) for name, norm in self._grad_norms.items()}
        record = TrainRecord(
            **vars(rates),
            **norms,
            iteration=self.state.iteration,
            epoch=self._epoch(self.state.iteration),
            loss=loss,
            task_losses=task_losses,
            lr=optimizers.learning_rate,
            lr_tables=optimizers.tables.learning_rate,
            lr_parts={
                part.regex: (part.learning_rate or optimizers.dense.learning_rate) * optimizers.lr_multiplier
                for part in self.config.optimizer.part_optimizers
            },
            memory_bytes=memory_bytes(self.mesh.device),
            time_s=time.monotonic() - self._begun,
            loss_scale=None if scale is None else scale.value,
            skipped_steps=None if scale is None else scale.pop_skipped_steps(),
            tables=pop_reports(
                dynamic_tables(self.state.model),
                lambda own: sum_over_ranks(torch.tensor(own), group).tolist(),
            ),
        )
        self.run_directory.write(record)
        log.info(format_train(record, self.total_iters, straggler))
        for table, report in record.tables.items():
            log.info(describe_report(table, report))
        bar.set_postfix(loss=f"{loss:.4g}", refresh=False)

    def _evaluate_at_end(self) -> None:
        """Evaluate the last weights on the splits that choose the best ones, and the best ones on the other splits."""
        last, choosing = self.state.iteration, self.source.eval_splits
        left = [split for split in self.source.final_splits if not self._history.has(split, last)]
        self.evaluate(tuple(split for split in left if split in choosing))
        others, best = tuple(split for split in left if split not in choosing), self._selection.iteration
        if others and best is not None and best != last and self.args.saves_checkpoints:
            with self.mesh.heartbeat.during("loading the best checkpoint"):
                self._has_best_weights = self.checkpoints.load_weights(best, self.state)
            if self._has_best_weights:
                log.info("iteration %d is the best by %s: it is evaluated on the test", best, self.args.best_metric)
                last = best
        self.evaluate(others, last)

    def evaluate(self, splits: tuple[Split, ...], iteration: int | None = None) -> None:
        """Evaluate and record ``splits``. ``iteration``: that of the weights. Raises Stopped at a stop signal."""
        iteration = self.state.iteration if iteration is None else iteration
        self.pipeline.resolve()
        for split in splits:
            is_new = not self._history.has(split, iteration)
            self._history.add(self._measure(split, self.source.eval_batches(split), iteration))
            is_best = is_new and split == self._selection.split and self._selection.follow(self._history)
            if is_best and self.args.saves_checkpoints:
                self._save()
                with self.meter.paused(), self.mesh.heartbeat.during("saving a checkpoint"):
                    self.checkpoints.mark_best(self.state.iteration)

    def _measure(self, split: Split, batches: Iterator[HSTUBatch], iteration: int) -> EvalRecord:
        begun = time.monotonic()
        during = self.mesh.heartbeat.during(f"evaluating on {split}")
        averaged = self.state.optimizers.dense.averaged_weights()
        with self.meter.paused(), self.pipeline.evaluation(), averaged, during:
            metrics = self.evaluator.evaluate(batches)
        record = EvalRecord(iteration=iteration, epoch=self._epoch(iteration), split=split, metrics=metrics)
        self.run_directory.write(record)
        log.info(format_eval(record, time.monotonic() - begun))
        return record

    def _missed_evaluation(self) -> bool:
        """Whether the run that saved the checkpoint would have evaluated next."""
        iteration = self.state.iteration
        is_due = self.phase.first_iteration < iteration < self.total_iters and "evaluation" in self._intervals.due
        return is_due and not self._history.has(self.source.eval_splits[0], iteration)

    def _save(self) -> None:
        self.pipeline.resolve()
        is_new = self.checkpoints.newest_iteration != self.state.iteration
        if self.args.saves_checkpoints and is_new and not self._has_best_weights:
            with self.meter.paused(), self.mesh.heartbeat.during("saving a checkpoint"):
                self.checkpoints.save(self.state)

    def _epoch(self, iteration: int) -> float:
        in_phase = iteration - self.phase.first_iteration - self._shift
        return self.phase.first_epoch + in_phase / self.source.batches_per_epoch

    def _host_of(self, rank: int) -> str:
        """The name of a rank's host. Collective."""
        name = [socket.gethostname()]
        dist.broadcast_object_list(name, rank, self.mesh.world_group)
        return name[0]

    def _summarise(self, status: str) -> None:
        if status in ("done", "stopped early") and self.source.trained_on and self.checkpoints.newest_iteration:
            directory = self.run_directory.path
            path, output = (quote(str(path)) for path in (directory, Path("exports", directory.name)))
            log.info("next: %s --run_dir %s", command("scripts/evaluate.py"), path)
            served = "" if self.config.why_no_program else " --program"
            log.info("      %s --run_dir %s --output %s%s", command("scripts/export.py"), path, output, served)
        elif status == "stopped" and self.checkpoints.newest_iteration:
            binding = f"'TrainerArgs.output_dir = \"{self.run_directory.path}\"'"
            log.info("to go on: the same command with the bindings %s 'TrainerArgs.ckpt_load_dir = \"auto\"'", binding)
        rates = self._last_throughput
        names = ("samples_per_s", "tokens_per_s", "tflops", "mfu")
        chosen = self._selection
        best = {"metric": chosen.metric, "split": chosen.split, "value": chosen.value, "iter": chosen.iteration}
        self.run_directory.write_summary(
            status=status,
            iterations=self.state.iteration,
            best_metrics=self._history.best,
            last_metrics=self._history.last,
            throughput={} if rates is None else {name: getattr(rates, name) for name in names},
            seconds=time.monotonic() - self._begun,
            **({"best": best} if chosen.metric else {}),
        )
        self.run_directory.close()
