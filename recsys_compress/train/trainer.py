"""The trainer: a job in, a trained model and its figures out."""

import dataclasses
import gc
import math
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from recsys_compress.compress.policy import Policy, PolicyPhase, resolve
from recsys_compress.compress.size import SizeReport
from recsys_compress.config import Job
from recsys_compress.data.batch import Batch
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.reader import Reader
from recsys_compress.data.split import Split
from recsys_compress.errors import UserError
from recsys_compress.files import to_json, write_text
from recsys_compress.ranks import Ranks
from recsys_compress.runtime import flush_denormals
from recsys_compress.train.best import keep_best, load_best
from recsys_compress.train.build import Built, build, logical_tables, lowered
from recsys_compress.train.checkpoint import Checkpoint, Saver, load_newest
from recsys_compress.train.context import stop_signals, tags
from recsys_compress.train.evaluate import evaluate
from recsys_compress.train.events import Listener, Metrics, RunResult, RunStart
from recsys_compress.train.folder import (
    RESULT,
    go_on,
    read_policy,
    run_job,
    write_folder,
    write_size,
)
from recsys_compress.train.handover import Start, hand_over
from recsys_compress.train.memory import peak_rss_bytes
from recsys_compress.train.meter import Clock, Meter, check_finite
from recsys_compress.train.metrics import BinaryMetrics
from recsys_compress.train.shard import process_group
from recsys_compress.train.snapshot import restore, snapshot
from recsys_compress.train.state import Progress
from recsys_compress.train.step import Learner

LOG_SECONDS = 1.0  # between reports of the training loss


def train(
    job: Job | None,
    *,
    listeners: Sequence[Listener] = (),
    resume: Path | None = None,
    start: Start | None = None,
) -> RunResult:
    """Trains a model as the job says, keeps the best weights on validation, reads test once.

    SIGINT ends training after the current step with a checkpoint; `resume` goes on from it, as from
    any checkpoint, and ends with the weights of a run that was never stopped.

    Args:
        job: the job; None to take that of the run to resume.
        listeners: hear of the run's course.
        resume: folder of a run to go on with.
        start: a trained model whose weights the run begins with; training then only fine-tunes it.

    Raises:
        UserError: the job does not suit the data, a file cannot be read or written, or training
            diverged.
    """
    try:
        if job is None:
            if resume is None:
                raise ValueError("give a job or a run to resume")
            job = run_job(resume)
        with (
            process_group(job.train.device, job.sharding.timeout) as ranks,
            stop_signals() as asked,
        ):
            trainer = Trainer(job, ranks, listeners, resume, start)
            trainer.fit(asked)
            return trainer.finish()
    except BaseException as error:
        for listener in listeners:
            listener.failed(error)
        raise


class Trainer:
    """Trains one job in one folder, phase by phase.

    Args:
        job: what to train.
        ranks: the processes that train together; the first one speaks for all.
        listeners: hear of the run's course.
        resume: the run's folder, if it has begun before.
        start: a trained model to begin with.
    """

    def __init__(
        self,
        job: Job,
        ranks: Ranks,
        listeners: Sequence[Listener],
        resume: Path | None,
        start: Start | None = None,
    ) -> None:
        self.clock = Clock(ranks)
        flush_denormals()
        if job.train.threads:
            torch.set_num_threads(job.train.threads)
        self.job = job
        self.ranks = ranks
        self.listeners = listeners if ranks.first else ()
        self.interrupted = False
        with ranks.together():
            self.dataset = PreparedDataset.open(job.data.path)
        self.tables = logical_tables(self.dataset.schema, job.embedding.dim)
        self.progress = Progress(
            run_id=ranks.agree(uuid.uuid4().hex),
            dataset=self.dataset.checksum,
            streams=job.data.streams or ranks.size,
        )
        checkpoint = None if resume is None else load_newest(resume / "checkpoints", ranks)
        if checkpoint is None or resume is None:
            policy = start.policy if start else resolve(job.embedding, self.tables)
        else:  # what was found may be more than the job says
            policy = read_policy(resume)
            self.progress = Progress(**checkpoint.state)
            with ranks.together():
                go_on(resume, job, self.progress, self.dataset, first=ranks.first)
        if start is None and job.train.epochs == 0:
            raise UserError("train.epochs = 0: only a trained model needs no training; raise it")
        self.reader = self._reader("train")
        self.search_reader = self._reader("valid", shuffle=True)
        self.evaluations = job.train.evaluation_steps(len(self.reader))
        self.phases = policy.phases()
        self._parent = start.tags if start else {}
        if start is not None:
            self.progress.phase = len(self.phases) - 1
        first = self.phases[self.progress.phase].policy
        if checkpoint is not None:
            first = Policy.described(self.progress.lowering, where=f"{resume}/checkpoints")
        self._enter(first)
        self.size = self._size(self.phases[-1].policy)
        self.folder = resume or Path(job.train.output) / f"{self.name}-{self.progress.run_id[:8]}"
        self.saver = Saver(
            self.folder / "checkpoints", ranks, background=job.train.background_checkpoints
        )
        if start is not None:
            start.write(self.built)
        if checkpoint is None:
            with ranks.together():
                if ranks.first:
                    last = self.phases[-1].policy.describe(self.tables)
                    write_folder(self.folder, job, self.size, last)
        else:
            self._restore(checkpoint)
        with ranks.together():
            self._tell_start(new=resume is None)
        if start is not None:
            self._evaluate_and_keep(math.nan)  # fine-tuning may only better it

    @property
    def name(self) -> str:
        """A readable name, like "dcnv2-unified-10x-s0"."""
        job = self.job
        return job.tracking.run_name or (
            f"{job.model.name}-{job.embedding.stored_by}-{self.size.ratio:.3g}x-s{job.train.seed}"
        )

    @property
    def phase(self) -> PolicyPhase:
        """The phase that is trained."""
        return self.phases[self.progress.phase]

    def fit(self, asked: threading.Event) -> None:
        """Trains until all phases are over, or a process is asked to stop."""
        self._train_phase(asked)
        while not self.interrupted and self.progress.phase + 1 < len(self.phases):
            self._next_phase()
            self._train_phase(asked)
        self.saver.commit()

    def _train_phase(self, asked: threading.Event) -> None:
        """Trains until the phase's epochs are over, or validation stops improving."""
        meter = Meter()
        while not self._phase_is_over():
            for batch in self.reader:
                done, steps = self._done(), self._phase_steps()
                loss, self.interrupted, written = self.learner.step(
                    batch,
                    done / steps,
                    (done + 1) / steps,
                    stop=asked.is_set(),
                    written=self.saver.ready,
                )
                if written:
                    self.saver.commit()
                meter.add(loss, batch.total)
                self.progress.step += 1
                # A phase may begin, and so end, within an epoch.
                ended = self._done() >= steps
                due = ended or self.progress.step % len(self.reader) in self.evaluations
                if due or self.interrupted or meter.seconds > LOG_SECONDS:
                    mean = self._report(meter)
                    if due:
                        self._evaluate_and_keep(mean)
                    meter = Meter()
                if due or self.interrupted or self._is_checkpoint_step():
                    self._checkpoint()
                if self.interrupted or self._phase_is_over():
                    return

    def _phase_is_over(self) -> bool:
        waited = self.progress.waited >= self.job.train.patience
        return waited or self._done() >= self._phase_steps()

    def _phase_steps(self, phase: PolicyPhase | None = None) -> int:
        """Returns the most steps of a phase, by default of the current one."""
        epochs = (phase or self.phase).epochs
        return (self.job.train.epochs if epochs is None else epochs) * len(self.reader)

    def _done(self) -> int:
        """Returns the steps done in this phase."""
        return self.progress.step - self.progress.phase_step

    def _next_phase(self) -> None:
        """Builds the next phase's model out of this one's best weights."""
        self._load_best()
        progress, phase = self.progress, self.phases[self.progress.phase + 1]
        start = hand_over(self.built, self.dataset, self.tables, phase.policy)
        progress.phase += 1
        progress.phase_step = progress.step
        progress.best, progress.waited = None, 0
        del self.built, self.learner
        gc.collect()  # hooks hold the old tables in a cycle; they must go before the new ones come
        self._enter(start.policy)
        start.write(self.built)
        if progress.phase + 1 == len(self.phases):  # what was found is in the last one's policy
            self.phases[-1] = dataclasses.replace(phase, policy=start.policy)
            self.size = self._size(start.policy)
            with self.ranks.together():
                if self.ranks.first:
                    write_size(self.folder, self.size, start.policy.describe(self.tables))
        del start  # a copy of the tables
        self._tell({"train/phase": progress.phase})
        self._checkpoint()
        self.saver.commit()  # before this phase's best weights take the place of the last one's

    def _enter(self, policy: Policy) -> None:
        """Builds the model of the current phase."""
        self.built: Built = build(self.job, self.dataset.schema, policy)
        self.learner = Learner(self.built, self.phase, self.ranks, self._endless())
        self.progress.lowering = policy.describe(self.tables)
        ahead = self.phases[self.progress.phase :]
        self.total_steps = self.progress.phase_step + sum(self._phase_steps(p) for p in ahead)

    def _endless(self) -> Iterator[Batch]:
        """Yields batches of the validation split for ever."""
        while True:
            yield from self.search_reader

    def evaluate(self, split: Split) -> BinaryMetrics:
        """Returns the metrics of the current weights on a split."""
        self.learner.average_statistics()
        metrics = evaluate(self.built.model, self._reader(split), self.built.device)
        self.learner.set_modes()
        return metrics

    def finish(self) -> RunResult:
        """Loads the best weights, reads test, writes the result and tells the listeners."""
        test, calibration, ranks = {}, [], self.ranks
        if not self.interrupted:
            self._load_best()
            metrics = self.evaluate("test")
            test, calibration = metrics.compute(), metrics.reliability()
        self.clock.count(self.progress)
        progress = self.progress
        best = progress.best or {}
        result = RunResult(
            run_id=progress.run_id,
            folder=self.folder,
            valid={k: v for k, v in best.items() if k != "step"},
            test=test,
            bytes=self.built.count_bytes(self.size),
            samples_per_s=progress.rows / max(progress.train_seconds, 1e-9),
            peak_rss_bytes=max(ranks.gather(peak_rss_bytes())),
            seconds=progress.seconds,
            cpu_seconds=progress.cpu_seconds,
            steps=progress.step,
            best_step=int(best.get("step", 0)),
            interrupted=self.interrupted,
            history=progress.history,
            calibration=calibration,
            kept=[dataclasses.asdict(part) for part in self.built.policy.kept_parts(self.tables)],
            dataset=self.dataset.checksum,
        )
        with ranks.together():
            if ranks.first:
                write_text(self.folder / RESULT, to_json(result.to_json(), indent=2))
            for listener in self.listeners:
                listener.finished(result)
        return result

    def _report(self, meter: "Meter") -> float:
        loss, speed = meter.loss(), meter.rows / meter.seconds
        self.progress.rows += meter.rows
        self.progress.train_seconds += meter.seconds
        check_finite("loss", loss, self.progress.step)
        self._tell({"train/loss": loss, "perf/samples_per_s": speed})
        return loss

    def _evaluate_and_keep(self, train_loss: float) -> None:
        progress, config = self.progress, self.job.train
        valid = self.evaluate("valid").compute()
        check_finite("validation logloss", valid["logloss"], progress.step)
        self._tell({f"eval/{name}": value for name, value in valid.items() if name != "rows"})
        epoch = progress.step / len(self.reader)
        when = {"step": progress.step, "epoch": epoch, "phase": progress.phase}
        progress.history.append({**when, "train_loss": train_loss, **valid})
        if progress.best is None or config.score(valid) > config.score(progress.best):
            progress.best, progress.waited = {**valid, "step": progress.step}, 0
            keep_best(self.built, self.folder, self.ranks, progress.step)
        else:
            progress.waited += 1

    def _is_checkpoint_step(self) -> bool:
        every = self.job.train.checkpoint_steps
        return every > 0 and self.progress.step % every == 0

    def _load_best(self) -> None:
        best = self.progress.best
        if best is not None and best["step"] != self.progress.step:
            load_best(self.built, self.folder)

    def _checkpoint(self) -> None:
        self.clock.count(self.progress)
        self.progress.reader = self.reader.state_dict()
        self.progress.search_reader = self.search_reader.state_dict()
        self.learner.average_statistics()
        self.saver.save(
            f"step-{self.progress.step:09d}-{self.progress.phase}",
            snapshot(self.built, self.learner.hooks, self.ranks),
            dataclasses.asdict(self.progress),
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.reader.load_state_dict(self.progress.reader)
        self.search_reader.load_state_dict(self.progress.search_reader)
        restore(checkpoint, self.built, self.learner.hooks, self.ranks, self.progress.step)

    def _reader(self, split: Split, *, shuffle: bool | None = None) -> Reader:
        config = self.job.train
        training = split == "train" if shuffle is None else shuffle
        return Reader(
            self.dataset,
            split,
            batch_size=config.batch_size if training else config.eval_batch_size,
            seed=config.seed,
            shuffle=training,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            # What is only evaluated is read in any order, so by each process from its own place.
            streams=self.progress.streams if training else None,
            buffer_rows=self.job.data.buffer_rows,
        )

    def _size(self, policy: Policy) -> SizeReport:
        """Returns the bytes of the tables under a policy."""
        if policy is self.built.policy:
            return self.built.embeddings.size_report(self.job.train.optimizer)
        return lowered(self.job, self.dataset.schema, policy).size_report(self.job.train.optimizer)

    def _tell_start(self, *, new: bool) -> None:
        start = RunStart(
            job=self.job,
            folder=self.folder,
            run_id=self.progress.run_id,
            name=self.name,
            total_steps=self.total_steps,
            first_step=self.progress.step,
            bytes=self.built.count_bytes(self.size),
            size=self.size.to_json(),
            shards=[dataclasses.asdict(shard) for shard in self.built.shards()],
            tags={**tags(self.dataset), **self._parent},
        )
        try:
            for listener in self.listeners:
                listener.started(start)
        except BaseException:  # a listener refuses: the run has not begun, so it leaves nothing
            if new:
                shutil.rmtree(self.folder)
            raise

    def _tell(self, values: Metrics) -> None:
        for listener in self.listeners:
            listener.metrics(self.progress.step, values)
