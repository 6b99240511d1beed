"""The trainer: a job in, a trained model and its figures out."""

import dataclasses
import math
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from recsys_compress.compress.hook import SearchStep
from recsys_compress.compress.method import Kept
from recsys_compress.compress.policy import Policy, PolicyPhase, resolve
from recsys_compress.compress.size import SizeReport
from recsys_compress.compress.tensors import below
from recsys_compress.config import Job, load_job
from recsys_compress.data.batch import Batch
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.reader import Reader
from recsys_compress.data.split import Split
from recsys_compress.errors import UserError
from recsys_compress.files import atomic_file, to_json, write_text
from recsys_compress.train.build import Built, build, logical_tables, lowered
from recsys_compress.train.checkpoint import Checkpoint, load_newest, save
from recsys_compress.train.context import sigint, tags
from recsys_compress.train.evaluate import evaluate
from recsys_compress.train.events import Listener, Metrics, RunResult, RunStart
from recsys_compress.train.folder import JOB, MODEL, RESULT, read_policy, write_folder, write_size
from recsys_compress.train.handover import Start, hand_over
from recsys_compress.train.memory import peak_rss_bytes
from recsys_compress.train.meter import Meter, Penalty
from recsys_compress.train.metrics import BinaryMetrics
from recsys_compress.train.shard import process_group
from recsys_compress.train.state import Progress

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
    started = time.perf_counter()
    try:
        if job is None:
            if resume is None:
                raise ValueError("give a job or a run to resume")
            job = load_job(resume / JOB)
        with process_group(), sigint() as interrupted:
            trainer = Trainer(job, listeners, resume, start)
            trainer.fit(interrupted)
            return trainer.finish(interrupted.is_set(), started)
    except BaseException as error:
        for listener in listeners:
            listener.failed(error)
        raise


class Trainer:
    """Trains one job in one folder, phase by phase.

    Args:
        job: what to train.
        listeners: hear of the run's course.
        resume: the run's folder, if it has begun before.
        start: a trained model to begin with.
    """

    def __init__(
        self,
        job: Job,
        listeners: Sequence[Listener],
        resume: Path | None,
        start: Start | None = None,
    ) -> None:
        if job.train.threads:
            torch.set_num_threads(job.train.threads)
        self.job = job
        self.listeners = listeners
        self.dataset = PreparedDataset.open(job.data.path)
        self.tables = logical_tables(self.dataset.schema, job.embedding.dim)
        self.reader = self._reader("train")
        self.search_reader = self._reader("valid", shuffle=True)
        self.evaluations = _evaluation_steps(job.train.evals_per_epoch, len(self.reader))
        self.progress = Progress()
        checkpoint = None if resume is None else load_newest(resume / "checkpoints")
        if checkpoint is None or resume is None:
            policy = start.policy if start else resolve(job.embedding, self.tables)
        else:  # what was found may be more than the job says
            policy = read_policy(resume)
            self.progress = Progress(**checkpoint.state)
        if start is None and job.train.epochs == 0:
            raise UserError("train.epochs = 0: only a trained model needs no training; raise it")
        self.phases = policy.phases()
        self._parent = start.tags if start else {}
        if start is not None:
            self.progress.phase = len(self.phases) - 1
        first = self.phases[self.progress.phase].policy
        if checkpoint is not None:
            first = Policy.described(self.progress.lowering, where=f"{resume}/checkpoints")
        self._enter(first)
        self.size = self._size(self.phases[-1].policy)
        name = f"{self.name}-{self.progress.run_id[:8]}"
        self.folder = resume or Path(job.train.output) / name
        if start is not None:
            start.write(self.built)
        if checkpoint is None:
            write_folder(self.folder, job, self.size, self._described())
        else:
            self._restore(checkpoint)
        try:
            self._tell_start()
        except BaseException:  # a listener refuses: the run has not begun, so it leaves nothing
            if resume is None:
                shutil.rmtree(self.folder)
            raise
        if start is not None:
            self._evaluate_and_keep(math.nan)  # fine-tuning may only better it

    @property
    def name(self) -> str:
        """A readable name, like "dcnv2-unified-10x-s0"."""
        job = self.job
        method = "plan" if job.embedding.plan else job.embedding.method
        return job.tracking.run_name or (
            f"{job.model.name}-{method}-{self.size.ratio:.3g}x-s{job.train.seed}"
        )

    @property
    def phase(self) -> PolicyPhase:
        """The phase that is trained."""
        return self.phases[self.progress.phase]

    def fit(self, interrupted: threading.Event) -> None:
        """Trains until all phases are over or the user interrupts."""
        self._train_phase(interrupted)
        while not interrupted.is_set() and self.progress.phase + 1 < len(self.phases):
            self._next_phase()
            self._train_phase(interrupted)

    def _train_phase(self, interrupted: threading.Event) -> None:
        """Trains until the phase's epochs are over, or validation stops improving."""
        meter = Meter()
        while not self._phase_is_over():
            for batch in self.reader:
                meter.add(self._step(batch), len(batch))
                self.progress.step += 1
                due = self.progress.step % len(self.reader) in self.evaluations
                if due or interrupted.is_set() or meter.seconds > LOG_SECONDS:
                    loss = self._report(meter)
                    if due:
                        self._evaluate_and_keep(loss)
                    meter = Meter()
                stop = interrupted.is_set()
                if due or stop or self._is_checkpoint_step():
                    self._checkpoint()
                if stop or self.progress.waited >= self.job.train.patience:
                    return

    def _phase_is_over(self) -> bool:
        waited = self.progress.waited >= self.job.train.patience
        return waited or self._done() >= self._phase_steps()

    def _phase_steps(self, phase: PolicyPhase | None = None) -> int:
        """Returns the most steps of a phase, by default of the current one."""
        epochs = (phase or self.phase).epochs
        return (self.job.train.epochs if epochs is None else epochs) * len(self.reader)

    def _next_phase(self) -> None:
        """Builds the next phase's model out of this one's best weights."""
        self._load_best()
        progress, phase = self.progress, self.phases[self.progress.phase + 1]
        start = hand_over(self.built, self.dataset, self.tables, phase.policy)
        progress.phase += 1
        progress.phase_step = progress.step
        progress.best, progress.waited = None, 0
        self._enter(start.policy)
        start.write(self.built)
        if progress.phase + 1 == len(self.phases):  # what was found is in the last one's policy
            self.phases[-1] = dataclasses.replace(phase, policy=start.policy)
            self.size = self._size(start.policy)
            write_size(self.folder, self.size, self._described())
        self._tell({"train/phase": progress.phase})
        self._checkpoint()

    def _enter(self, policy: Policy) -> None:
        """Builds the model of the current phase."""
        self.built: Built = build(self.job, self.dataset.schema, policy)
        self.hooks = self.built.embeddings.hooks()
        self.progress.lowering = policy.describe(self.tables)
        ahead = self.phases[self.progress.phase :]
        self.total_steps = self.progress.phase_step + sum(self._phase_steps(p) for p in ahead)
        self._penalty = Penalty(self.job.embedding.l2, self.built.embeddings)
        self._search_batches = self._endless()
        self._set_modes()

    def _set_modes(self) -> None:
        """Sets the model to training, batch norm only where the model is trained."""
        self.built.model.train()
        if self.phase.freeze_model:
            for module in self.built.model.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.eval()

    def _endless(self) -> Iterator[Batch]:
        """Yields batches of the validation split for ever."""
        while True:
            yield from self.search_reader

    def evaluate(self, split: Split) -> BinaryMetrics:
        """Returns the metrics of the current weights on a split."""
        metrics = evaluate(self.built.model, self._reader(split), self.built.device)
        self._set_modes()
        return metrics

    def finish(self, interrupted: bool, started: float) -> RunResult:
        """Loads the best weights, reads test, writes the result and tells the listeners."""
        test, calibration = {}, []
        if not interrupted:
            self._load_best()
            metrics = self.evaluate("test")
            test, calibration = metrics.compute(), metrics.reliability()
        progress = self.progress
        best = progress.best or {}
        result = RunResult(
            run_id=progress.run_id,
            folder=self.folder,
            valid={k: v for k, v in best.items() if k != "step"},
            test=test,
            bytes=self._bytes(),
            samples_per_s=progress.rows / max(progress.train_seconds, 1e-9),
            peak_rss_bytes=peak_rss_bytes(),
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time(),
            steps=progress.step,
            best_step=int(best.get("step", 0)),
            interrupted=interrupted,
            history=progress.history,
            calibration=calibration,
            kept=[dataclasses.asdict(part) for part in self._kept()],
        )
        write_text(self.folder / RESULT, to_json(result.to_json(), indent=2))
        for listener in self.listeners:
            listener.finished(result)
        return result

    def _step(self, batch: Batch) -> Tensor:
        built, done, steps = self.built, self._done(), self._phase_steps()
        batch = batch.to(built.device)
        built.optimizers.schedule(done / steps, self.phase.rate)
        built.optimizers.zero_grad()
        loss = self._loss(batch)
        torch.autograd.backward(self._penalty.added_to(loss))
        built.optimizers.step(tables_only=self.phase.freeze_model)
        if self.phase.search:
            self._search(batch)
        for hook in self.hooks:
            hook.on_step((done + 1) / steps)
        return loss.detach()

    def _done(self) -> int:
        """Returns the steps done in this phase."""
        return self.progress.step - self.progress.phase_step

    def _loss(self, batch: Batch) -> Tensor:
        logits = self.built.model(batch.dense, batch.sparse)
        return binary_cross_entropy_with_logits(logits, batch.labels, batch.weights)

    def _search(self, batch: Batch) -> None:
        """Lets hooks take a step of their own, in which no table moves."""
        valid = next(self._search_batches).to(self.built.device)
        self.built.embeddings.frozen = True
        try:
            for hook in self.hooks:
                hook.search(
                    SearchStep(
                        train=batch.sparse,
                        valid=valid.sparse,
                        train_loss=lambda: self._loss(batch),
                        valid_loss=lambda: self._loss(valid),
                    )
                )
        finally:
            self.built.embeddings.frozen = False

    def _report(self, meter: "Meter") -> float:
        loss, speed = meter.loss(), meter.rows / meter.seconds
        self.progress.rows += meter.rows
        self.progress.train_seconds += meter.seconds
        if not math.isfinite(loss):
            raise UserError(
                f"training diverged: loss {loss} before step {self.progress.step}; lower "
                "train.learning_rate or embedding.learning_rate"
            )
        self._tell({"train/loss": loss, "perf/samples_per_s": speed})
        return loss

    def _evaluate_and_keep(self, train_loss: float) -> None:
        progress, config = self.progress, self.job.train
        valid = self.evaluate("valid").compute()
        self._tell({f"eval/{name}": value for name, value in valid.items() if name != "rows"})
        epoch = progress.step / len(self.reader)
        progress.history.append(
            {
                "step": progress.step,
                "epoch": epoch,
                "phase": progress.phase,
                "train_loss": train_loss,
                **valid,
            }
        )
        sign = -1 if config.monitor == "logloss" else 1
        if (
            progress.best is None
            or sign * valid[config.monitor] > sign * progress.best[config.monitor]
        ):
            progress.best = {**valid, "step": progress.step}
            progress.waited = 0
            with atomic_file(self.folder / MODEL) as path:
                save_file(_contiguous(self.built.weights()), path, {"step": str(progress.step)})
        else:
            progress.waited += 1

    def _is_checkpoint_step(self) -> bool:
        every = self.job.train.checkpoint_steps
        return every > 0 and self.progress.step % every == 0

    def _load_best(self) -> None:
        if self.progress.best is None or self.progress.best["step"] == self.progress.step:
            return
        best = load_file(self.folder / MODEL)
        for name, value in self.built.weights().items():
            value.copy_(best[name])

    def _checkpoint(self) -> None:
        self.progress.reader = self.reader.state_dict()
        self.progress.search_reader = self.search_reader.state_dict()
        tensors = {f"model/{name}": value for name, value in self.built.weights().items()}
        tensors |= {f"optim/{n}": v for n, v in self.built.optimizers.tensors().items()}
        for number, hook in enumerate(self.hooks):
            tensors |= {f"hook/{number}/{n}": v for n, v in hook.tensors().items()}
        tensors["rng"] = torch.get_rng_state()
        save(
            self.folder / "checkpoints",
            f"step-{self.progress.step:09d}-{self.progress.phase}",
            Checkpoint(tensors=tensors, state=dataclasses.asdict(self.progress)),
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors
        self.reader.load_state_dict(self.progress.reader)
        self.search_reader.load_state_dict(self.progress.search_reader)
        for name, value in self.built.weights().items():
            value.copy_(tensors[f"model/{name}"])
        self.built.optimizers.load_tensors(below("optim/", tensors))
        for number, hook in enumerate(self.hooks):
            hook.load_tensors(below(f"hook/{number}/", tensors))
        torch.set_rng_state(tensors["rng"])

    def _reader(self, split: Split, *, shuffle: bool | None = None) -> Reader:
        config = self.job.train
        training = split == "train" if shuffle is None else shuffle
        return Reader(
            self.dataset,
            split,
            batch_size=config.batch_size if training else config.eval_batch_size,
            seed=config.seed,
            shuffle=training,
            buffer_rows=self.job.data.buffer_rows,
        )

    def _kept(self) -> Iterator[Kept]:
        """Yields what methods that choose by part keep."""
        for assignment in self.built.policy.assign(self.tables):
            part = assignment.rule.method.kept_parts(assignment.tables)
            if part is not None:
                yield part

    def _described(self) -> list[dict[str, Any]]:
        """Returns the policy of the last phase as plain data."""
        return self.phases[-1].policy.describe(self.tables)

    def _size(self, policy: Policy) -> SizeReport:
        """Returns the bytes of the tables under a policy."""
        if policy is self.built.policy:
            return self.built.embeddings.size_report(self.job.train.optimizer)
        return lowered(self.job, self.dataset.schema, policy).size_report(self.job.train.optimizer)

    def _bytes(self) -> dict[str, float]:
        """Returns the bytes of the model that the last phase trains."""
        dense = sum(weight.nbytes for weight in self.built.dense_weights().values())
        return {
            "tables": self.size.table_bytes,
            "full": self.size.full_bytes,
            "ratio": self.size.ratio,
            "optimizer": self.size.optimizer_bytes,
            "model": dense + self.size.table_bytes,
        }

    def _tell_start(self) -> None:
        start = RunStart(
            job=self.job,
            folder=self.folder,
            run_id=self.progress.run_id,
            name=self.name,
            total_steps=self.total_steps,
            first_step=self.progress.step,
            bytes=self._bytes(),
            size=self.size.to_json(),
            tags={**tags(self.dataset), **self._parent},
        )
        for listener in self.listeners:
            listener.started(start)

    def _tell(self, values: Metrics) -> None:
        for listener in self.listeners:
            listener.metrics(self.progress.step, values)


def _evaluation_steps(per_epoch: int, steps: int) -> set[int]:
    """Returns the steps of an epoch, modulo its length, after which to evaluate."""
    return {-(-steps * i // per_epoch) % steps for i in range(1, per_epoch + 1)}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
