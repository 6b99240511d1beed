"""Every parameter in exactly one optimizer: fused ones in the kernels, the rest here."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from recsys_compress.compress import CompressedEmbeddingBagCollection, TableOptions
from recsys_compress.config import TrainConfig
from recsys_compress.errors import UserError


class Optimizers:
    """The optimizers of a sharded model, stepped and saved as one.

    Args:
        model: the sharded model.
        embeddings: its tables.
        config: optimizer of the dense part and schedule of all.

    Raises:
        UserError: the optimizer does not have what the job asks of it.
        RuntimeError: a parameter is in no optimizer or in two, which would be our fault.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        embeddings: CompressedEmbeddingBagCollection,
        config: TrainConfig,
    ) -> None:
        self._model = model
        self._fused = model.fused_optimizer
        self._schedule = config.schedule
        self._factor = 1.0
        parameters = dict(model.named_parameters())
        fused = set(self._fused.params)
        elsewhere = tuple(f".{n}" for n, o in embeddings.table_options().items() if o.fused)
        # Of a table that other processes have all of, there is an empty one here.
        parameters = {
            n: p for n, p in parameters.items() if n in fused or not n.endswith(elsewhere)
        }
        tables = _dense_tables(model, embeddings)
        held = [p for hook in embeddings.hooks() for p in hook.parameters]
        taken = {id(p) for p in held}
        rest = [
            p
            for n, p in parameters.items()
            if n not in fused and n not in tables and id(p) not in taken
        ]
        self._dense = [_dense(config, rest)]
        if tables:
            groups = [
                {"params": [parameters[n]], "lr": o.learning_rate, "weight_decay": o.weight_decay}
                for n, o in tables.items()
            ]
            self._dense.append(torch.optim.Adam(groups, fused=True))
        _check_partition(parameters, fused, held, self._dense)
        self._rates = [[g["lr"] for g in o.param_groups] for o in (self._fused, *self._dense)]

    def zero_grad(self) -> None:
        """Forgets the gradients of the dense part."""
        for optimizer in self._dense:
            optimizer.zero_grad(set_to_none=True)

    def step(self, *, tables_only: bool = False) -> None:
        """Updates what is not fused; fused tables were updated in the backward pass.

        Args:
            tables_only: whether the model keeps its parameters.
        """
        for optimizer in self._dense[1:] if tables_only else self._dense:
            optimizer.step()

    @property
    def dense_parameters(self) -> list[nn.Parameter]:
        """The parameters that are not fused; every process has all of them."""
        return [p for o in self._dense for group in o.param_groups for p in group["params"]]

    def state_of(self, parameter: str) -> dict[str, Any]:
        """Returns a parameter's live state, sharded like it, by its name in the model."""
        fused = self._fused.state_dict()["state"]
        if parameter in fused:
            return dict(fused[parameter])
        weight = dict(self._model.named_parameters())[parameter]
        states = [o.state[weight] for o in self._dense if weight in o.state]
        return dict(states[0]) if states else {}

    def schedule(self, progress: float, share: float = 1.0) -> None:
        """Sets learning rates.

        Args:
            progress: point of training, from 0 at its start to 1 at its end.
            share: of the rates set for all of training.
        """
        left = 1.0 - progress
        falls = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
        factor = falls[self._schedule] * share
        if factor == self._factor:
            return
        self._factor = factor
        for optimizer, rates in zip((self._fused, *self._dense), self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        self._fused.step()  # hands the rates to the kernels

    def fused_tensors(self) -> dict[str, Any]:
        """Returns the live state of the fused tables, sharded like them, by flat names."""
        return {
            f"fused/{parameter}/{key}": value
            for parameter, state in self._fused.state_dict()["state"].items()
            for key, value in state.items()
        }

    def dense_tensors(self) -> dict[str, Tensor]:
        """Returns the state of all else, which is the same in every process, by flat names."""
        return {
            f"dense/{number}/{index}/{key}": value
            for number, optimizer in enumerate(self._dense)
            for index, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }

    def load_dense(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `dense_tensors` returned."""
        for number, optimizer in enumerate(self._dense):
            states: dict[int, dict[str, Any]] = {}
            for name, value in tensors.items():
                kind, *path = name.split("/")
                if kind == "dense" and path[0] == str(number):
                    states.setdefault(int(path[1]), {})[path[2]] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states, "param_groups": groups})


def _dense(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return torch.optim.AdamW(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
    if config.weight_decay:
        raise UserError(
            f"train.weight_decay = {config.weight_decay}: only optimizer 'adam' decays weights; "
            f"set it to 0 for {config.optimizer!r}"
        )
    kind = torch.optim.Adagrad if config.optimizer == "adagrad" else torch.optim.SGD
    return kind(parameters, lr=config.learning_rate)


def _dense_tables(
    model: nn.Module, embeddings: CompressedEmbeddingBagCollection
) -> dict[str, TableOptions]:
    """Returns the options of the tables trained by dense Adam, by parameter name in `model`."""
    options = {
        id(embeddings.get_parameter(name)): option
        for name, option in embeddings.table_options().items()
        if not option.fused
    }
    return {n: options[id(p)] for n, p in model.named_parameters() if id(p) in options}


def _check_partition(
    parameters: Mapping[str, Tensor],
    fused: set[str],
    held: list[nn.Parameter],
    dense: list[torch.optim.Optimizer],
) -> None:
    owned = [id(p) for o in dense for g in o.param_groups for p in g["params"]]
    owned += [id(p) for p in held]  # a method trains these itself
    for name, parameter in parameters.items():
        owners = (name in fused) + owned.count(id(parameter))
        if owners != 1:
            raise RuntimeError(f"parameter {name} is in {owners} optimizers")
