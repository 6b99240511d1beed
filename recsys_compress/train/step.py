"""One step of training: losses, gradients, updates, and what processes tell each other for it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from recsys_compress.compress.hook import SearchStep
from recsys_compress.compress.policy import PolicyPhase
from recsys_compress.data.batch import Batch
from recsys_compress.ranks import Ranks
from recsys_compress.train.build import Built
from recsys_compress.train.meter import Penalty

STEP_FIGURES = 3  # that go with the gradients: the loss, who is to stop, who has written


class Learner:
    """Trains a model step by step in one phase.

    Each process has its share of a batch. Its loss is the mean over its share, such that the mean
    over processes is the loss of the batch. Fused tables get the mean of the gradients through the
    exchange of their vectors; those of all else are averaged here, together with the loss.

    Args:
        built: the model.
        phase: what is trained how.
        ranks: the processes.
        search: endless batches of the validation split, for a phase that searches.
    """

    def __init__(
        self, built: Built, phase: PolicyPhase, ranks: Ranks, search: Iterator[Batch]
    ) -> None:
        self.built = built
        self.hooks = built.embeddings.hooks()
        self._phase = phase
        self._ranks = ranks
        self._search_batches = search
        self._penalty = Penalty(built.job.embedding.l2, built.embeddings)
        self._norms = [m for m in built.model.modules() if isinstance(m, nn.BatchNorm1d)]
        self.set_modes()

    def set_modes(self) -> None:
        """Sets the model to training, batch norm only where the model is trained.

        Of a model that is not trained no gradient is asked for, which is a third of its time.
        """
        self.built.model.train()
        if self._phase.freeze_model:
            self._learn_statistics(False)
            tables = {id(parameter) for parameter in self.built.embeddings.parameters()}
            for parameter in self.built.optimizers.dense_parameters:
                parameter.requires_grad_(id(parameter) in tables)

    def step(
        self, batch: Batch, done: float, after: float, *, stop: bool = False, written: bool = False
    ) -> tuple[Tensor, bool, bool]:
        """Learns from a batch.

        Args:
            batch: this process's share.
            done: share of the phase's steps that are done.
            after: the same after this step.
            stop: whether this process was asked to stop.
            written: whether this process has written its part of a checkpoint.

        Returns:
            The loss of the whole batch, whether any process was asked to stop, and whether all have
            written.
        """
        built = self.built
        batch = batch.to(built.device)
        built.optimizers.schedule(done, self._phase.rate)
        built.optimizers.zero_grad()
        # One row has no variance, and padding is no row.
        self._learn_statistics(len(batch) > 1 and not batch.padding)
        loss = self._loss(batch)
        rows = batch.total / self._ranks.size
        torch.autograd.backward(self._penalty.added_to(loss, rows))
        loss, stops, writes = self._averaged(loss.detach(), float(stop), float(written))
        built.optimizers.step(tables_only=self._phase.freeze_model)
        if self._phase.search:
            self._search(batch)
        for hook in self.hooks:
            hook.on_step(after)
        return loss, stops > 0.0, writes == 1.0

    def average_statistics(self) -> None:
        """Makes the running statistics of batch norm the mean of those of all processes."""
        for module in self._norms:
            if module.running_mean is not None and module.running_var is not None:
                self._ranks.mean_(module.running_mean)
                self._ranks.mean_(module.running_var)

    def _learn_statistics(self, wanted: bool) -> None:
        """Sets whether batch norm takes the statistics of the batch, and keeps them."""
        for module in self._norms:
            module.train(wanted and not self._phase.freeze_model)

    def _loss(self, batch: Batch) -> Tensor:
        built = self.built
        bf16 = built.job.train.precision == "bf16"
        with torch.autocast(built.device.type, torch.bfloat16, enabled=bf16):
            logits = built.model(batch.dense, batch.sparse)
        total = binary_cross_entropy_with_logits(
            logits.float(), batch.labels, batch.weights, reduction="sum"
        )
        return total * (self._ranks.size / batch.total)

    def _averaged(self, loss: Tensor, stops: float, writes: float) -> tuple[Tensor, float, float]:
        """Averages the gradients of what is replicated and, in the same exchange, these figures."""
        if self._ranks.size == 1:
            return loss, stops, writes
        with torch.no_grad():
            gradients = [p.grad for p in self.built.optimizers.dense_parameters]
            found = [g for g in gradients if g is not None]
            said = torch.cat([loss.view(1), loss.new_tensor([stops, writes])])
            flat = self._ranks.mean_(torch.cat([said, *(g.flatten() for g in found)]))
            said, *means = torch.split(flat, [STEP_FIGURES, *(g.numel() for g in found)])
            for gradient, mean in zip(found, means, strict=True):
                gradient.copy_(mean.view_as(gradient))
            return said[0], float(said[1]), float(said[2])

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
