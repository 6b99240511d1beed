import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_compress.byte_sizes import budget_bytes, format_bytes, parse_bytes
from recsys_compress.errors import UserError


@pytest.mark.parametrize(
    ("text", "size"),
    [("158kB", 158_000), ("2MiB", 2 << 20), ("1.5 GB", 1_500_000_000), ("4096", 4096), ("7b", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size
    assert budget_bytes(text, 1) == budget_bytes(size, 1) == size


@given(share=st.floats(min_value=1e-6, max_value=1), full=st.integers(1, 2**40))
def test_shares_of_the_full_bytes(share: float, full: int) -> None:
    assert abs(budget_bytes(f"{share}x", full) - share * full) <= 1


@pytest.mark.parametrize("text", ["", "kB", "0", "-3kB", "0x", "-0.1x", "3 apples", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match=r"not understood|not positive"):
        budget_bytes(text, 100)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (158_112, "158 kB"), (2.5e13, "25 TB")],
)
def test_format_bytes(size: float, text: str) -> None:
    assert format_bytes(size) == text
