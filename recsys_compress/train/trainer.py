"""The trainer: a job in, a trained model and its figures out."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.sparse.jagged_tensor import KeyedTensor

from recsys_compress.compress.policy import describe
from recsys_compress.config import Job, dump_job, load_job
from recsys_compress.data.batch import Batch
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.reader import Reader
from recsys_compress.data.split import Split
from recsys_compress.errors import UserError
from recsys_compress.files import atomic_file, atomic_folder, to_json, write_text
from recsys_compress.train.build import Built, build, logical_tables
from recsys_compress.train.checkpoint import Checkpoint, load_newest, save
from recsys_compress.train.events import Listener, Metrics, RunResult, RunStart
from recsys_compress.train.memory import peak_rss_bytes
from recsys_compress.train.metrics import BinaryMetrics
from recsys_compress.train.shard import full_tensors, process_group

LOG_SECONDS = 1.0  # between reports of the training loss
MODEL = "model.safetensors"
LIBRARIES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "pyarrow", "recsys-compress")


def train(
    job: Job | None, *, listeners: Sequence[Listener] = (), resume: Path | None = None
) -> RunResult:
    """Trains a model as the job says, keeps the best weights on validation, reads test once.

    SIGINT ends training after the current step with a checkpoint; `resume` goes on from it, as from
    any checkpoint, and ends with the weights of a run that was never stopped.

    Args:
        job: the job; None to take that of the run to resume.
        listeners: hear of the run's course.
        resume: folder of a run to go on with.

    Raises:
        UserError: the job does not suit the data, a file cannot be read or written, or training
            diverged.
    """
    started = time.perf_counter()
    try:
        if job is None:
            if resume is None:
                raise ValueError("give a job or a run to resume")
            job = load_job(resume / "job.toml")
        with process_group(), _sigint() as interrupted:
            trainer = Trainer(job, listeners, resume)
            trainer.fit(interrupted)
            return trainer.finish(interrupted.is_set(), started)
    except BaseException as error:
        for listener in listeners:
            listener.failed(error)
        raise


@dataclasses.dataclass
class Progress:
    """What a checkpoint remembers besides tensors.

    Attributes:
        run_id: 32 hexadecimal digits.
        step: training steps done.
        rows: training rows seen.
        train_seconds: spent on them, evaluation left out.
        reader: position of the training reader.
        best: validation figures of the best weights so far, with their "step".
        waited: evaluations since then.
        history: one entry per evaluation.
    """

    run_id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    step: int = 0
    rows: int = 0
    train_seconds: float = 0.0
    reader: dict[str, int] = dataclasses.field(default_factory=dict)
    best: Metrics | None = None
    waited: int = 0
    history: list[Metrics] = dataclasses.field(default_factory=list)


class Trainer:
    """Trains one job in one folder.

    Args:
        job: what to train.
        listeners: hear of the run's course.
        resume: the run's folder, if it has begun before.
    """

    def __init__(self, job: Job, listeners: Sequence[Listener], resume: Path | None) -> None:
        if job.train.threads:
            torch.set_num_threads(job.train.threads)
        self.job = job
        self.listeners = listeners
        self.dataset = PreparedDataset.open(job.data.path)
        self.built: Built = build(job, self.dataset.schema)
        self.size = self.built.embeddings.size_report(job.train.optimizer)
        self.reader = self._reader("train")
        self.total_steps = job.train.epochs * len(self.reader)
        self.evaluations = _evaluation_steps(job.train.evals_per_epoch, len(self.reader))
        self.progress = Progress()
        self._penalty = _Penalty(job.embedding.l2, self.built.embeddings)
        name = f"{self.name}-{self.progress.run_id[:8]}"
        self.folder = resume or Path(job.train.output) / name
        if resume is None:
            self._write_folder()
        else:
            self._restore(load_newest(self.folder / "checkpoints"))
        try:
            self._tell_start()
        except BaseException:  # a listener refuses: the run has not begun, so it leaves nothing
            if resume is None:
                shutil.rmtree(self.folder)
            raise

    @property
    def name(self) -> str:
        """A readable name, like "dcnv2-unified-10x-s0"."""
        job = self.job
        return job.tracking.run_name or (
            f"{job.model.name}-{job.embedding.method}-{self.size.ratio:.3g}x-s{job.train.seed}"
        )

    def fit(self, interrupted: threading.Event) -> None:
        """Trains until the epochs are over, validation stops improving or the user interrupts."""
        meter = _Meter()
        while self.progress.step < self.total_steps:
            for batch in self.reader:
                meter.add(self._step(batch), len(batch))
                self.progress.step += 1
                due = self.progress.step % len(self.reader) in self.evaluations
                if due or interrupted.is_set() or meter.seconds > LOG_SECONDS:
                    loss = self._report(meter)
                    if due:
                        self._evaluate_and_keep(loss)
                    meter = _Meter()
                stop = interrupted.is_set()
                if due or stop or self._is_checkpoint_step():
                    self._checkpoint()
                if stop or self.progress.waited >= self.job.train.patience:
                    return

    def evaluate(self, split: Split) -> BinaryMetrics:
        """Returns the metrics of the current weights on a split."""
        metrics = BinaryMetrics()
        self.built.model.eval()
        with torch.no_grad():
            for batch in self._reader(split):
                batch = batch.to(self.built.device)
                logits = self.built.model(batch.dense, batch.sparse)
                metrics.update(logits, batch.labels, batch.weights)
        self.built.model.train()
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
            steps=progress.step,
            best_step=int(best.get("step", 0)),
            interrupted=interrupted,
            history=progress.history,
            calibration=calibration,
        )
        write_text(self.folder / "result.json", to_json(result.to_json(), indent=2))
        for listener in self.listeners:
            listener.finished(result)
        return result

    def _step(self, batch: Batch) -> Tensor:
        built = self.built
        batch = batch.to(built.device)
        built.optimizers.schedule(self.progress.step / self.total_steps)
        built.optimizers.zero_grad()
        logits = built.model(batch.dense, batch.sparse)
        loss = binary_cross_entropy_with_logits(logits, batch.labels, batch.weights)
        torch.autograd.backward(self._penalty.added_to(loss))
        built.optimizers.step()
        return loss.detach()

    def _report(self, meter: "_Meter") -> float:
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
            {"step": progress.step, "epoch": epoch, "train_loss": train_loss, **valid}
        )
        sign = -1 if config.monitor == "logloss" else 1
        if (
            progress.best is None
            or sign * valid[config.monitor] > sign * progress.best[config.monitor]
        ):
            progress.best = {**valid, "step": progress.step}
            progress.waited = 0
            with atomic_file(self.folder / MODEL) as path:
                save_file(_contiguous(self._weights()), path, {"step": str(progress.step)})
        else:
            progress.waited += 1

    def _is_checkpoint_step(self) -> bool:
        every = self.job.train.checkpoint_steps
        return every > 0 and self.progress.step % every == 0

    def _weights(self) -> dict[str, Tensor]:
        return full_tensors(self.built.model.state_dict())

    def _load_best(self) -> None:
        if self.progress.best is None or self.progress.best["step"] == self.progress.step:
            return
        best = load_file(self.folder / MODEL)
        for name, value in self._weights().items():
            value.copy_(best[name])

    def _checkpoint(self) -> None:
        self.progress.reader = self.reader.state_dict()
        tensors = {f"model/{name}": value for name, value in self._weights().items()}
        tensors |= {f"optim/{n}": v for n, v in self.built.optimizers.tensors().items()}
        tensors["rng"] = torch.get_rng_state()
        save(
            self.folder / "checkpoints",
            self.progress.step,
            Checkpoint(tensors=tensors, state=dataclasses.asdict(self.progress)),
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors
        self.progress = Progress(**checkpoint.state)
        self.reader.load_state_dict(self.progress.reader)
        for name, value in self._weights().items():
            value.copy_(tensors[f"model/{name}"])
        optim = {n.removeprefix("optim/"): v for n, v in tensors.items() if n.startswith("optim/")}
        self.built.optimizers.load_tensors(optim)
        torch.set_rng_state(tensors["rng"])

    def _reader(self, split: Split) -> Reader:
        config, training = self.job.train, split == "train"
        return Reader(
            self.dataset,
            split,
            batch_size=config.batch_size if training else config.eval_batch_size,
            seed=config.seed,
            shuffle=training,
            buffer_rows=self.job.data.buffer_rows,
        )

    def _write_folder(self) -> None:
        tables = logical_tables(self.dataset.schema, self.job.embedding.dim)
        lowering = [
            {
                "tables": [table.name for table in assignment.tables],
                **describe(assignment.rule.method),
                "options": dataclasses.asdict(assignment.rule.options),
            }
            for assignment in self.built.policy.assign(tables)
        ]
        with atomic_folder(self.folder) as folder:
            (folder / "job.toml").write_text(dump_job(self.job), encoding="utf-8")
            (folder / "size.json").write_text(json.dumps(self.size.to_json(), indent=2))
            (folder / "lowering.json").write_text(json.dumps(lowering, indent=2))

    def _bytes(self) -> dict[str, float]:
        weights = self._weights().values()
        return {
            "tables": self.size.table_bytes,
            "full": self.size.full_bytes,
            "ratio": self.size.ratio,
            "optimizer": self.size.optimizer_bytes,
            "model": sum(w.numel() * w.element_size() for w in weights),
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
            tags=_tags(self.dataset),
        )
        for listener in self.listeners:
            listener.started(start)

    def _tell(self, values: Metrics) -> None:
        for listener in self.listeners:
            listener.metrics(self.progress.step, values)


class _Meter:
    """Training loss and speed since it was made."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._started = time.perf_counter()
        self.rows = 0

    def add(self, loss: Tensor, rows: int) -> None:
        self._losses.append(loss)
        self.rows += rows

    def loss(self) -> float:
        return float(torch.stack(self._losses).mean())

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started


class _Penalty:
    """An L2 penalty on looked-up vectors; hears of them by a hook on the embeddings."""

    def __init__(self, strength: float, embeddings: nn.Module) -> None:
        self._strength = strength
        self._term: Tensor | None = None
        if strength:
            embeddings.register_forward_hook(lambda _module, _inputs, output: self._look(output))

    def added_to(self, loss: Tensor) -> Tensor:
        return loss if self._term is None else loss + self._term

    def _look(self, output: KeyedTensor) -> None:
        vectors = output.values()
        self._term = self._strength / 2 * vectors.square().sum() / vectors.shape[0]


def _evaluation_steps(per_epoch: int, steps: int) -> set[int]:
    """Returns the steps of an epoch, modulo its length, after which to evaluate."""
    return {-(-steps * i // per_epoch) % steps for i in range(1, per_epoch + 1)}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _tags(dataset: PreparedDataset) -> dict[str, str]:
    tags = {"dataset.checksum": dataset.checksum}
    for library in LIBRARIES:
        try:
            tags[f"version.{library}"] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    git = shutil.which("git")
    if git:
        head = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True)
        tags |= {"git.commit": head.stdout.strip()} if head.returncode == 0 else {}
    return tags


@contextmanager
def _sigint() -> Iterator[threading.Event]:
    """Yields an event that the first SIGINT sets; the second one acts as ever."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(_number: int, _frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
