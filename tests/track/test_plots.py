from pathlib import Path

import pytest
from matplotlib.image import imread

from recsys_compress.track.plots import (
    QualityPoint,
    calibration,
    format_bytes,
    learning_curve,
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


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (158_112, "158 kB"), (2.5e13, "25 TB")],
)
def test_format_bytes(size: float, text: str) -> None:
    assert format_bytes(size) == text
