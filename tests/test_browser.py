"""That the check of pages finds what it is for."""

from pathlib import Path

import pytest

from recsys_compress.track.webpage import page
from tests.browser import browser, check_readable

SVG = '<svg viewBox="0 0 350 10"><text y="9" font-size="14">chart</text></svg>'


def test_a_page_that_is_not_readable_is_found(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    bad = {
        "scrolls sideways": '<div style="width: 500px">wide</div>',
        "text is small": '<p style="font-size: 13px">small</p>',
        "text in a chart is small": SVG.replace("14", "12"),
        "Refused": "<script>throw new Error('Refused')</script>",
        "elsewhere.svg": '<img src="elsewhere.svg">',
    }
    with browser(tmp_path) as shown:
        for said, part in bad.items():
            body = [part] if "<svg" in part else [SVG, part]
            path.write_text(page("A page", body), encoding="utf-8")
            with pytest.raises(AssertionError, match=said):
                check_readable(shown, path, charts=1)
        path.write_text(page("A page", [SVG]), encoding="utf-8")
        check_readable(shown, path, charts=1)
