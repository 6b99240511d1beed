from pathlib import Path

import numpy as np
from matplotlib.image import imread

from recsys_compress.track.heatmap import heat_map


def draw(kept: dict[str, list[float]], path: Path) -> np.ndarray:
    heat_map(kept, path, most=16, label="dims kept", columns="block")
    return imread(path)[..., :3]


def share(pixels: np.ndarray, colour: tuple[float, float, float]) -> float:
    """Returns the share of pixels of nearly one colour."""
    return float((np.abs(pixels - np.array(colour)).max(axis=-1) < 0.02).mean())


DARKEST, BRIGHTEST, MISSING = (0.0, 0.135, 0.305), (0.996, 0.909, 0.217), (0.867, 0.867, 0.867)


def test_cells_have_the_colour_of_their_figure(tmp_path: Path) -> None:
    none = draw({"user": [0, 0], "item": [0, 0]}, tmp_path / "a.png")
    all_ = draw({"user": [16, 16], "item": [16, 16]}, tmp_path / "b.png")
    half = draw({"user": [16, 0], "item": [16, 0]}, tmp_path / "c.png")
    assert none.shape == all_.shape == half.shape
    full = share(all_, BRIGHTEST)
    assert full > 0.2
    assert share(none, DARKEST) > 0.2
    assert 0.4 * full < share(half, BRIGHTEST) < 0.6 * full


def test_parts_that_a_table_lacks_are_grey(tmp_path: Path) -> None:
    assert share(draw({"user": [16, 0], "item": [8, 8]}, tmp_path / "a.png"), MISSING) < 0.01
    assert share(draw({"user": [16, 0], "item": [8]}, tmp_path / "b.png"), MISSING) > 0.05


def test_many_tables_make_a_taller_picture(tmp_path: Path) -> None:
    few = draw({"t0": [1, 2, 3]}, tmp_path / "a.png")
    many = draw({f"t{i}": [1, 2, 3] for i in range(26)}, tmp_path / "b.png")
    assert many.shape[0] > 3 * few.shape[0]
    assert many.shape[1] == few.shape[1]
