from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.image import imread

from recsys_compress.track.plots import (
    QualityPoint,
    calibration,
    learning_curve,
    log_bytes,
    panels,
    quality_vs_bytes,
)
from tests.track.conftest import HISTORY


def is_drawn(path: Path) -> bool:
    """Whether the picture has ink on white."""
    pixels = imread(path)[..., :3]
    return bool(0.005 < (pixels.min(axis=-1) < 0.7).mean() < 0.5)


def test_learning_curve(tmp_path: Path) -> None:
    assert is_drawn(learning_curve(HISTORY, 20, tmp_path / "a.png"))


def test_learning_curve_with_nan(tmp_path: Path) -> None:
    history = [entry | {"auc": float("nan")} for entry in HISTORY]
    assert is_drawn(learning_curve(history, 20, tmp_path / "a.png"))


def test_calibration_of_rates_near_0(tmp_path: Path) -> None:
    bins = [{"predicted": i / 1e5, "observed": i / 1e5, "rows": 10.0} for i in range(10)]
    assert is_drawn(calibration(bins, tmp_path / "a.png"))


def test_quality_vs_bytes(tmp_path: Path) -> None:
    points = [
        QualityPoint(method=method, bytes=size, auc=0.8 - gap / size)
        for method, gap in (("unified", 1e3), ("hash", 3e3))
        for size in (1e5, 1e6)
    ]
    full = QualityPoint(method="full", bytes=1e7, auc=0.8)
    path = quality_vs_bytes(points, tmp_path / "a.png", full=full, best_auc=0.81)
    assert is_drawn(path)


@pytest.mark.parametrize("most", [1.0001e4, 2e4, 1e5, 1e6, 1e9, 1e13])
@pytest.mark.parametrize(("number", "narrow"), [(1, False), (2, False), (2, True)])
def test_sizes_below_an_axis_have_room(most: float, number: int, narrow: bool) -> None:
    figure, (axes, *_) = panels(number, narrow=narrow, height=3)
    axes.plot([1e4, most], [0, 1])
    log_bytes(axes)
    figure.draw_without_rendering()
    least, greatest = axes.get_xlim()
    boxes = [
        label.get_window_extent()
        for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        if least <= place <= greatest
    ]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert boxes or most < 2e4
