from hypothesis import given
from hypothesis import strategies as st

from recsys_compress.track.webpage import page, plain, table, terms


@given(st.text())
def test_no_text_is_markup(text: str) -> None:
    for shown in (plain(text), page(text, []), terms([(text, text)]), table([text], [], text)):
        assert "<script>alert" not in shown.replace(plain(text), "")
        assert plain(text) in shown
    assert not set(plain(text)) & set("<>\"'")


def test_numbers_are_set_to_the_right_and_long_texts_break() -> None:
    shown = table(
        ["row", "bytes", "lost", "asked", "why"],
        [
            ["1x", "1,000", "+0.1 ± 0.2", "≥ 0.5", "nothing"],
            ["2x", "", "-.3", "< 2", "5 % of them, and so on"],
        ],
        "A table",
    )
    assert shown.count('<td class="number">') == 2 * 3
    assert shown.count('<td class="long">') == 2
    assert "<td>1x</td>" in shown
    assert 'aria-label="A table"' in shown
