"""Raw columns as features: times, in whatever zone and form they are written."""

import pyarrow as pa
import pytest

from recsys_compress.data.inputs import IdInput
from recsys_compress.errors import UserError

INSTANT = 1508938238  # 2017-10-25, a Wednesday, 13:30:38 UTC
FORMS = {
    "UTC": pa.array([INSTANT], pa.timestamp("s", "UTC")),
    "another zone": pa.array([INSTANT * 1000], pa.timestamp("ms", "America/New_York")),
    "text in UTC": pa.array(["2017-10-25T13:30:38Z"]),
    "text with an offset": pa.array(["2017-10-25 18:30:38.250+05:00"]),
}
NAIVE = {
    "timestamp": pa.array([INSTANT * 1_000_000], pa.timestamp("us")),
    "text": pa.array(["2017-10-25 13:30:38"]),
    "text with a fraction": pa.array(["2017-10-25T13:30:38.125"]),
}


def hour(column: pa.Array, zone: str | None = None) -> list[int | None]:
    field = IdInput(name="at_hour", column="at", part="hour", zone=zone)
    return list(field.features(pa.table({"at": column}), "rows", 1)["at_hour"].to_pylist())


@pytest.mark.parametrize("form", FORMS)
def test_an_instant_has_one_hour_in_whatever_zone_it_is_written(form: str) -> None:
    assert hour(FORMS[form]) == [13]
    assert hour(FORMS[form], "America/New_York") == [9]


@pytest.mark.parametrize("form", NAIVE)
def test_a_time_that_names_no_zone_is_taken_as_it_stands(form: str) -> None:
    assert hour(NAIVE[form]) == hour(NAIVE[form], "America/New_York") == [13]


def test_missing_times_stay_missing() -> None:
    assert hour(pa.array([None, "2017-10-25T13:30:38Z"])) == [None, 13]


@pytest.mark.parametrize("column", [pa.array([INSTANT]), pa.array(["soon"]), pa.array([True])])
def test_what_is_no_time_is_one_clear_error(column: pa.Array) -> None:
    with pytest.raises(UserError, match="rows: column 'at' holds no times"):
        hour(column)
