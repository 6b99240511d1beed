"""A budget plan on disk: which table is stored how, as TOML.

```
format = 1
dim = 16                 # of the logical tables that it was made for
optimizer = "adam"       # on which its bytes hang
[rows]                   # ids by table
user = 6042
needs_start = false      # whether it must begin with a trained run's tables
[summary]                # what was asked for and what was found; for people and programs
[[assignments]]          # as `Policy.describe` has them
tables = ["user"]
method = "low_rank"
rank = {user = 4}
options = {storage = "int8"}
[[tables]]               # a line of the report for each table
```
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.lowering import TableOptions
from recsys_compress.compress.policy import Policy
from recsys_compress.config import EmbeddingConfig
from recsys_compress.errors import UserError
from recsys_compress.files import read_toml, write_text
from recsys_compress.settings import STRICT, parse, without_none

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """The contents of a plan file.

    Attributes:
        format: version of the file's layout.
        dim: width of the logical tables.
        optimizer: of the tables.
        rows: ids by logical table.
        assignments: as `Policy.describe` writes them; of the options `storage` alone.
        needs_start: whether it only makes sense for tables that begin with a trained run's.
        summary: what was asked for and what was found.
        tables: what was found for each table.
    """

    __pydantic_config__ = STRICT

    format: int = FORMAT
    dim: int
    optimizer: str
    rows: dict[str, int]
    assignments: tuple[dict[str, Any], ...]
    needs_start: bool = False
    summary: dict[str, Any] = field(default_factory=dict)
    tables: tuple[dict[str, Any], ...] = ()

    @staticmethod
    def of(
        policy: Policy,
        tables: Sequence[EmbeddingBagConfig],
        optimizer: str,
        *,
        needs_start: bool = False,
    ) -> "PlanFile":
        """Returns the plan that has a policy for tables of one width."""
        return PlanFile(
            needs_start=needs_start,
            dim=tables[0].embedding_dim,
            optimizer=optimizer,
            rows={table.name: table.num_embeddings for table in tables},
            assignments=tuple(
                {**described, "options": {"storage": described["options"]["storage"]}}
                for described in policy.describe(tables)
            ),
        )

    def write(self, path: Path) -> None:
        """Writes the plan, whole or not at all.

        Raises:
            UserError: the folder cannot be written.
        """
        write_text(path, tomli_w.dumps(without_none(dataclasses.asdict(self))))

    @staticmethod
    def read(path: Path) -> "PlanFile":
        """Reads a plan.

        Raises:
            UserError: the file cannot be read, or is no plan of this version.
        """
        raw = read_toml(path, "make one with `recsys-compress plan`")
        if raw.get("format") != FORMAT:
            raise UserError(
                f"{path}: has format {raw.get('format')!r}, this version reads {FORMAT}; make the "
                "plan anew"
            )
        return parse(PlanFile, raw, where=str(path))

    def check_from_scratch(self, where: str) -> None:
        """Refuses a plan that has to begin with trained tables.

        Args:
            where: the file, for messages.

        Raises:
            UserError: it has to.
        """
        if self.needs_start:
            raise UserError(
                f"{where}: has tables that must begin with a trained run's; add --start "
                f"{self.summary.get('reference', 'RUN')}"
            )

    def policy(
        self, tables: Sequence[EmbeddingBagConfig], options: TableOptions, *, where: str
    ) -> Policy:
        """Returns the plan's policy.

        Args:
            tables: the logical tables; they must be those that it was made for.
            options: of all tables but for the storage type, which the plan says.
            where: the file, for messages.

        Raises:
            UserError: it was made for other tables or another optimizer, or is not valid.
        """
        self._check(tables, options, where)
        try:
            policy = Policy.described(self.assignments, where=where)
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: an assignment lacks {error}; make the plan anew") from error
        rules = tuple(
            dataclasses.replace(
                rule, options=dataclasses.replace(options, storage=rule.options.storage)
            )
            for rule in policy.rules
        )
        assigned = sorted(name for a in self.assignments for name in a["tables"])
        if assigned != sorted(self.rows):
            raise UserError(f"{where}: does not assign each table once; make the plan anew")
        return dataclasses.replace(policy, rules=rules)

    def _check(
        self, tables: Sequence[EmbeddingBagConfig], options: TableOptions, where: str
    ) -> None:
        found: Mapping[str, int] = {table.name: table.num_embeddings for table in tables}
        for name in [*found, *self.rows]:
            if found.get(name) != self.rows.get(name):
                raise UserError(
                    f"{where}: was made for other data: table {name!r} has {_rows(self.rows, name)}"
                    f" there and {_rows(found, name)} here; make the plan anew"
                )
        dims = {table.embedding_dim for table in tables}
        if dims != {self.dim}:
            raise UserError(
                f"{where}: was made for embedding.dim = {self.dim}, the job has "
                f"{', '.join(map(str, sorted(dims)))}; make the plan anew or change the job"
            )
        if options.optimizer != self.optimizer:
            raise UserError(
                f"{where}: was made for embedding.optimizer = {self.optimizer!r}, the job has "
                f"{options.optimizer!r}; make the plan anew or change the job"
            )


def planned_policy(config: EmbeddingConfig, tables: Sequence[EmbeddingBagConfig]) -> Policy:
    """Returns the policy of the plan that a job names.

    Raises:
        UserError: the plan cannot be read, does not suit the tables, or the job contradicts it.
    """
    for key in ("budget", "rules"):
        if getattr(config, key):
            raise UserError(
                f"embedding.{key}: cannot go with embedding.plan, which says it all; drop one"
            )
    path = Path(config.plan or "")
    options = Policy.from_config(config).default.options
    return PlanFile.read(path).policy(tables, options, where=str(path))


def _rows(rows: Mapping[str, int], name: str) -> str:
    return f"{rows[name]:,} ids" if name in rows else "no ids"
