"""Where raw data comes from: one source a file, each a dataclass of its options."""

from collections.abc import Mapping

from recsys_compress.data.sources.criteo import Criteo
from recsys_compress.data.sources.frappe import Frappe
from recsys_compress.data.sources.movielens import MovieLens1M
from recsys_compress.data.sources.source import Source
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.data.sources.tabular import Tabular
from recsys_compress.errors import UserError, nearest
from recsys_compress.settings import parse

SOURCES: dict[str, type[Source]] = {
    kind.name: kind for kind in (MovieLens1M, Frappe, Criteo, Tabular, Synthetic)
}


def make_source(name: str, options: Mapping[str, object]) -> Source:
    """Returns the source `name` with some options, given as in TOML.

    Raises:
        UserError: there is no such source, or an option is unknown, missing or of another type.
    """
    if name not in SOURCES:
        raise UserError(f"source {name!r} is unknown; {nearest(name, SOURCES)}")
    return parse(SOURCES[name], options, where=f"source {name}")
