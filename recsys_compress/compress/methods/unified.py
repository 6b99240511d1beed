"""Unified Embedding: all features look up rows of one shared table.

Source: Coleman et al., "Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML
Systems", NeurIPS 2023.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.budget import out_of_reach
from recsys_compress.compress.hashing import Region, SaltedHash, salt
from recsys_compress.compress.lowering import Lookup, Lowering, PhysicalTable, TableOptions
from recsys_compress.compress.method import register
from recsys_compress.compress.sharing import SharedRows
from recsys_compress.errors import UserError, nearest

MAX_ROWS = 2**31 - 1


@register("unified")
@dataclass(frozen=True, kw_only=True)
class Unified(SharedRows):
    """Unified Embedding (feature multiplexing): one shared table, several salted hashes a feature.

    The vector of value v of feature t is the concatenation over its probes k = 1..c_t of the rows
    E[h_{t,k}(v)] of one table E in R^{M x d} (the paper's definition of feature multiplexing), with
    a hash function of its own for every (t, k). So a feature's vector is c_t x d wide. Unless
    `probe_dim` says otherwise, d is D over the greatest of `num_probes`: a feature with so many has
    the logical table's whole width D, one with fewer, as `lookups` may choose, is narrower.

    `head_share` goes beyond the paper: that share of the rows is dealt to the lowest ids, equally
    many of each feature, which have them alone; the rest is hashed as ever. Prepared vocabularies
    number ids by falling frequency, so those ids matter most. It is off by default.
    """

    across_tables: ClassVar[bool] = True

    num_embeddings: int | None = field(
        default=None, metadata={"help": "rows M of all shared tables together"}
    )
    num_probes: int | dict[str, int] = field(
        default=2, metadata={"help": "look-ups per feature; or by name, others take the greatest"}
    )
    probe_dim: int | None = field(
        default=None,
        metadata={"help": "width d of a row; by default D over the greatest num_probes"},
    )
    lookups: int | None = field(
        default=None, metadata={"help": "most look-ups per example; the largest tables get more"}
    )
    num_tables: int = field(
        default=1, metadata={"help": "shared tables; a feature's probes go to them in turn"}
    )
    head_share: float = field(
        default=0.0, metadata={"help": "share of the rows that the most frequent ids have alone"}
    )
    seed: int = field(default=0, metadata={"help": "of the hash functions"})

    def __post_init__(self) -> None:
        if self.num_tables < 1:
            raise UserError(
                f"embedding.methods.unified.num_tables = {self.num_tables}: must be 1 or more"
            )
        if self.num_probes == {}:
            raise UserError(
                "embedding.methods.unified.num_probes = {}: names no table; name one, or give one "
                "number for all"
            )

    def probes(self, tables: Sequence[EmbeddingBagConfig]) -> dict[str, int]:
        """Returns the number of probes c_t of each table.

        With `lookups` set, every table begins with one probe, and the rest of the look-ups go one
        by one to the table with the most ids (in bits) for each probe it has, up to `num_probes`:
        a batch's time grows with its look-ups, and large tables gain most from further ones.

        Raises:
            UserError: a name is unknown, or a number is below 1.
        """
        names = [table.name for table in tables]
        most = self._most_probes(names)
        if self.lookups is None:
            return most
        if self.lookups < len(names):
            raise UserError(
                f"embedding.methods.unified.lookups = {self.lookups}: {len(names)} tables need "
                "one each; raise it"
            )
        bits = {table.name: math.log2(table.num_embeddings + 1) for table in tables}
        chosen = dict.fromkeys(names, 1)
        queue = [(-bits[name], name) for name in names if most[name] > 1]
        heapq.heapify(queue)
        for _ in range(self.lookups - len(names)):
            if not queue:
                break
            _, name = heapq.heappop(queue)
            chosen[name] += 1
            if chosen[name] < most[name]:
                heapq.heappush(queue, (-bits[name] / chosen[name], name))
        return chosen

    def lower(self, tables: Sequence[EmbeddingBagConfig]) -> Lowering:
        """Returns the shared tables and the salted hashes into them."""
        if self.num_embeddings is None:
            raise UserError(
                "method 'unified' needs embedding.budget or "
                "embedding.methods.unified.num_embeddings"
            )
        rows = self._rows_per_table(self.num_embeddings)
        probes = self.probes(tables)
        heads = self._heads(tables, probes, rows)
        features = [feature for table in tables for feature in table.feature_names]
        lookups, salts, regions, source = [], [], [], []
        for position, table in enumerate(tables):
            for feature in table.feature_names:
                for probe in range(probes[table.name]):
                    shared = (position + probe) % self.num_tables
                    lookups.append(
                        Lookup(
                            name=f"{feature}#{probe}", feature=feature, table=f"unified_{shared}"
                        )
                    )
                    # Salted by the table's name: features that share a table share its rows.
                    salts.append(salt(table.name, probe, self.seed))
                    regions.append(heads[table.name, probe])
                    source.append(features.index(feature))
        members = tuple(table.name for table in tables)
        used = {lookup.table for lookup in lookups}
        return Lowering(
            tables=tuple(
                PhysicalTable(
                    name=f"unified_{i}",
                    num_embeddings=rows,
                    embedding_dim=self._row_dim(tables),
                    members=members,
                )
                for i in range(self.num_tables)
                if f"unified_{i}" in used
            ),
            lookups=tuple(lookups),
            ids=SaltedHash(
                source=source,
                salts=salts,
                regions=regions,
                names=[lookup.name for lookup in lookups],
            ),
        )

    def fit(
        self, tables: Sequence[EmbeddingBagConfig], budget_bytes: int, options: TableOptions
    ) -> "Unified":
        """Returns as many rows as the budget holds."""
        row_bytes = options.row_bytes(self._row_dim(tables))
        rows = min(budget_bytes // row_bytes, MAX_ROWS * self.num_tables)
        rows -= rows % self.num_tables
        if rows < self.num_tables:
            least, most = self.num_tables * row_bytes, MAX_ROWS * self.num_tables * row_bytes
            raise out_of_reach("unified", budget_bytes, least, most)
        return replace(self, num_embeddings=rows)

    def _heads(
        self, tables: Sequence[EmbeddingBagConfig], probes: dict[str, int], rows: int
    ) -> dict[tuple[str, int], Region]:
        """Returns where in its shared table each table's probe finds its rows.

        Raises:
            UserError: the share is not in [0, 1), or ids are hashes, of which none is frequent.
        """
        if not 0 <= self.head_share < 1:
            raise UserError(
                f"embedding.methods.unified.head_share = {self.head_share}: must lie in [0, 1)"
            )
        sizes = {table.name: int(table.num_embeddings) for table in tables}
        if self.head_share and max(sizes.values()) > MAX_ROWS:
            raise UserError(
                "embedding.methods.unified.head_share: needs ids numbered by frequency; prepare "
                "with --encoding vocabulary, or set it to 0"
            )
        regions = {}
        for shared in range(self.num_tables):
            dealt = [
                (table.name, probe)
                for position, table in enumerate(tables)
                for probe in range(probes[table.name])
                if (position + probe) % self.num_tables == shared
            ]
            head = _even_share(int(rows * self.head_share), [sizes[name] for name, _ in dealt])
            first = 0
            starts = {}
            for key in dealt:
                starts[key] = first
                first += min(head, sizes[key[0]])
            for key in dealt:
                regions[key] = Region(
                    head=min(head, sizes[key[0]]), start=starts[key], tail=first, rows=rows - first
                )
        return regions

    def _most_probes(self, names: Sequence[str]) -> dict[str, int]:
        given = self.num_probes
        if isinstance(given, int):
            most = dict.fromkeys(names, given)
        else:
            for name in given:
                if name not in names:
                    raise UserError(
                        f"embedding.methods.unified.num_probes: no table {name!r} is unified; "
                        f"{nearest(name, names)}"
                    )
            most = {name: given.get(name, max(given.values())) for name in names}
        for name, count in most.items():
            if count < 1:
                raise UserError(
                    f"embedding.methods.unified.num_probes: {count} for {name!r} is below 1"
                )
        return most

    def _row_dim(self, tables: Sequence[EmbeddingBagConfig]) -> int:
        """Returns d."""
        if self.probe_dim is not None:
            if self.probe_dim < 1:
                raise UserError(f"embedding.methods.unified.probe_dim = {self.probe_dim}: below 1")
            return self.probe_dim
        dims = {table.embedding_dim for table in tables}
        most = max(self._most_probes([table.name for table in tables]).values())
        if len(dims) != 1:
            raise UserError(
                f"method 'unified' needs tables of one width, these have {sorted(dims)}"
            )
        dim = int(dims.pop())
        if dim % most:
            raise UserError(
                f"embedding.dim = {dim}: is no multiple of {most} probes; use "
                f"{dim - dim % most or most} or {dim + most - dim % most}"
            )
        return dim // most

    def _rows_per_table(self, rows: int) -> int:
        if not 0 < self.num_tables <= rows:
            raise UserError(
                f"embedding.methods.unified: {rows} rows cannot fill {self.num_tables} tables"
            )
        per_table = rows // self.num_tables
        if per_table > MAX_ROWS:
            raise UserError(
                f"embedding.methods.unified.num_embeddings = {rows}: at most {MAX_ROWS} a table"
            )
        return per_table


def _even_share(total: int, sizes: Sequence[int]) -> int:
    """Returns the greatest h for which the sum of min(h, size) is at most `total`."""
    left, parts = total, len(sizes)
    for size in sorted(sizes):
        if left < size * parts:
            return left // parts
        left, parts = left - size, parts - 1
    return max(sizes, default=0)
