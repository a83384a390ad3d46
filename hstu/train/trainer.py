"""The training loop: step, log, evaluate, save, until the last iteration."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hstu.checkpoint.state import TrainState
from hstu.checkpoint.store import CheckpointStore
from hstu.config.args import TrainerArgs
from hstu.data.batch import HSTUBatch
from hstu.data.sampler import SamplerPosition
from hstu.data.sequences import Split
from hstu.observe.logging import ProgressBar, format_eval, format_train
from hstu.observe.profiler import Profiler
from hstu.observe.records import EvalRecord, TrainRecord
from hstu.observe.run_directory import RunDirectory
from hstu.observe.throughput import Throughput, ThroughputMeter, memory_bytes
from hstu.optim.schedule import Schedule
from hstu.parallel.collectives import sum_over_ranks
from hstu.parallel.dynamic.report import describe, take_reports
from hstu.parallel.embedding import dynamic_tables
from hstu.parallel.mesh import Mesh
from hstu.pipeline.base import TrainPipeline
from hstu.train.evaluator import Evaluator
from hstu.train.history import MetricsHistory
from hstu.train.sources import BatchSource
from hstu.train.stop import StopSignal
from hstu.train.work import StepWork

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Everything a run needs, handed in ready by the builder; ``train`` is the run."""

    args: TrainerArgs
    mesh: Mesh
    source: BatchSource
    pipeline: TrainPipeline
    schedule: Schedule
    evaluator: Evaluator
    checkpoints: CheckpointStore
    state: TrainState
    run_directory: RunDirectory
    meter: ThroughputMeter
    work: StepWork
    total_iters: int

    def __post_init__(self) -> None:
        self._begun = time.monotonic()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        self._steps_since_log = 0
        self._history = MetricsHistory()
        self._last_throughput: Throughput | None = None
        self._stop = StopSignal(self.mesh)

    def train(self) -> None:
        """Run to the last iteration, or until SIGTERM; the summary says how it ended."""
        self._stop.install()
        if self.args.gc_interval:
            gc.disable()
        status = "failed"
        try:
            with self.mesh.progress.during("restoring a checkpoint"):
                restored = self.checkpoints.restore(self.state)
                if self.args.ckpt_save_interval > 0:
                    self.checkpoints.claim()
            if restored and self.run_directory.resumed:
                self._history.read(self.run_directory.metrics_file, self.state.iteration)
            if self.args.eval_at_start:
                self.evaluate(self.source.eval_splits)
            finished = self._iterate()
            with self.mesh.progress.during("saving a checkpoint"):
                self.checkpoints.wait()
            if finished and self.args.eval_at_end:
                self.evaluate(self.source.final_splits)
            status = "done" if finished else "stopped"
        finally:
            gc.enable()
            self._summarise(status)

    def _iterate(self) -> bool:
        """Train to the last iteration; False where SIGTERM came first."""
        batches = self.meter.timed(self._loaded(self.source.train_batches(self.state.position)))
        args, path = self.args, self.run_directory.path
        profiler = Profiler(
            path, args.profile_step_start, args.profile_step_end, rank=self.mesh.rank, enabled=args.profile
        )
        progress = ProgressBar(
            self.total_iters, args.progress_bar, visible=self.mesh.is_main, initial=self.state.iteration
        )
        with profiler, progress:
            while self.state.iteration < self.total_iters:
                profiler.step(self.state.iteration)
                self._step(batches)
                progress.update()
                self._after_step(progress)
                self.checkpoints.poll()
                if self._stop.agreed():
                    log.warning("SIGTERM: stopping after iteration %d", self.state.iteration)
                    self._save()
                    return False
        return True

    def _loaded(self, batches: Iterator[HSTUBatch]) -> Iterator[HSTUBatch]:
        while True:
            with self.mesh.progress.during("loading a batch"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _step(self, batches: Iterator[HSTUBatch]) -> None:
        self.mesh.progress.mark("training step", self.state.iteration + 1)
        multiplier = self.schedule.multiplier(self.state.iteration, self.total_iters, self.source.batches_per_epoch)
        self.state.optimizers.set_lr_multiplier(multiplier)
        result = self.pipeline.progress(batches)
        self.state.iteration += 1
        self.state.position = result.batch.position or SamplerPosition()  # only a batch made by hand has none
        self._loss_sum += result.loss
        self._steps_since_log += 1
        tokens, flops = self.work.of(result.batch)
        self.meter.add(samples=result.batch.real_batch_size, tokens=tokens, flops=flops)

    def _after_step(self, progress: ProgressBar) -> None:
        iteration, args = self.state.iteration, self.args
        last = iteration == self.total_iters
        if iteration % args.log_interval == 0 or last:
            self._log(progress)
        if iteration % args.eval_interval == 0 and not (last and args.eval_at_end):
            self.evaluate(self.source.eval_splits)
        if args.ckpt_save_interval > 0 and (iteration % args.ckpt_save_interval == 0 or (last and args.save_at_end)):
            self._save()
        if args.gc_interval and iteration % args.gc_interval == 0:
            gc.collect()

    def evaluate(self, splits: tuple[Split, ...]) -> None:
        """Evaluate on each of ``splits`` and record the metrics; training state is left as it was."""
        for split in splits:
            begun = time.monotonic()
            during = self.mesh.progress.during(f"evaluating on {split}")
            with self.meter.paused(), self.pipeline.evaluation(), during:
                metrics = self.evaluator.evaluate(self.source.eval_batches(split))
            record = EvalRecord(iteration=self.state.iteration, epoch=self._epoch(), split=split, metrics=metrics)
            self._history.add(record)
            self.run_directory.write_eval(record)
            log.info(format_eval(record, time.monotonic() - begun))

    def _log(self, progress: ProgressBar) -> None:
        loss = float(self._loss_sum) / self._steps_since_log
        rates = self.meter.take(self._sum_over_ranks, self.mesh.world_size)
        self._last_throughput = rates
        record = TrainRecord(
            iteration=self.state.iteration,
            epoch=self._epoch(),
            loss=loss,
            lr=self.state.optimizers.learning_rate,
            samples_per_s=rates.samples_per_s,
            tokens_per_s=rates.tokens_per_s,
            tflops=rates.tflops,
            mfu=rates.mfu,
            data_wait=rates.data_wait,
            memory_bytes=memory_bytes(self.mesh.device),
            time_s=time.monotonic() - self._begun,
            tables=take_reports(dynamic_tables(self.state.model), self._sum_over_ranks),
        )
        self.run_directory.write_train(record)
        eta_s = (self.total_iters - self.state.iteration) * rates.step_s
        log.info(format_train(record, self.total_iters, eta_s))
        for table, report in record.tables.items():
            log.info(describe(table, report))
        progress.show(loss=loss)
        self._loss_sum.zero_()
        self._steps_since_log = 0

    def _save(self) -> None:
        if self.args.ckpt_save_interval > 0 and self.checkpoints.newest_iteration != self.state.iteration:
            with self.meter.paused(), self.mesh.progress.during("saving a checkpoint"):
                self.checkpoints.save(self.state)

    def _epoch(self) -> float:
        return self.state.iteration / self.source.batches_per_epoch

    def _sum_over_ranks(self, numbers: list[float]) -> list[float]:
        totals = torch.tensor(numbers, dtype=torch.float64)
        summed: list[float] = sum_over_ranks(totals, self.mesh.world_group).tolist()
        return summed

    def _summarise(self, status: str) -> None:
        rates = self._last_throughput
        throughput = (
            {}
            if rates is None
            else {
                "samples_per_s": rates.samples_per_s,
                "tokens_per_s": rates.tokens_per_s,
                "tflops": rates.tflops,
                "mfu": rates.mfu,
            }
        )
        self.run_directory.write_summary(
            status=status,
            iterations=self.state.iteration,
            last_metrics=self._history.last,
            best_metrics=self._history.best,
            throughput=throughput,
            seconds=time.monotonic() - self._begun,
        )
        self.run_directory.draw_curves()
        self.run_directory.close()
