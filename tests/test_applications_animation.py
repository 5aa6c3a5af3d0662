"""Films: every time once, in order, with its own masks, and the same pixels as the pictures that went in."""

from __future__ import annotations

import io
import stat
import subprocess
import sys

import cftime
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raysegment.applications import animation
from raysegment.applications.animation import GifFilm, draw_film, film_palette
from raysegment.applications.maps import PALETTES
from raysegment.applications.pictures import MaskBook, list_stills, time_stamp
from raysegment.archive.axes import Axes
from raysegment.archive.masks import write_masks
from raysegment.archive.snapshots import write_climatenet
from raysegment.climate.channels import CYCLONE, INDEX
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from tests.weather import quiet

GRID = Grid.global_(19, 36)
TIMES = [cftime.DatetimeNoLeap(2001, month, 1) for month in (5, 1, 3)]


def write_archive(folder, at_once: bool = False):
    """Three files whose names are not in the order of time, and their masks: one file for each, or one for all."""
    masks = np.zeros((3, *GRID.shape), np.uint8)
    for number, time in enumerate(TIMES):
        fields = quiet(GRID)
        fields[INDEX["TMQ"]] += 5.0 * np.cos(np.deg2rad(GRID.lat))[:, None]
        (folder / "a").mkdir(parents=True, exist_ok=True)
        write_climatenet(folder / "a" / f"{number}.nc", fields, GRID, None, time)
        masks[number, 10, 5 * number] = CYCLONE
        if not at_once:
            write_masks(folder / "m" / f"{number}.mask.nc", masks[number][None], Axes.of(GRID), [time], "test")
    if at_once:
        order = [1, 2, 0]
        write_masks(folder / "m" / "year.mask.nc", masks[order], Axes.of(GRID), [TIMES[k] for k in order], "test")
    return masks


@settings(max_examples=30, deadline=None)
@given(frames=st.lists(st.integers(0, 2**16), min_size=1, max_size=5), colours=st.sampled_from(sorted(PALETTES)))
def test_a_gif_shows_the_pictures_that_went_in(frames, colours):
    palette = film_palette(PALETTES[colours])
    greys = np.append(np.arange(0, 252, 4), 255).astype(np.uint8)
    pictures = [np.random.default_rng(seed).choice(greys, (6, 8, 1)).repeat(3, axis=2) for seed in frames]
    pictures.append(pictures[-1].copy())  # nothing changes
    held = io.BytesIO()
    film = GifFilm(held, palette, 4.0)
    for picture in pictures:
        film.add(picture)
    film.close()
    with Image.open(held) as read:
        shown = []
        for number in range(read.n_frames):  # pyright: ignore[reportAttributeAccessIssue]
            read.seek(number)
            shown.append(np.asarray(read.convert("RGB")))
        assert read.info["loop"] == 0
    for picture in shown:
        assert any(np.array_equal(picture, one) for one in pictures)
    np.testing.assert_array_equal(shown[0], pictures[0])
    np.testing.assert_array_equal(shown[-1], pictures[-1])


def test_times_are_in_order_and_masks_are_found_by_name_or_time(tmp_path):
    for at_once in (False, True):
        folder = tmp_path / str(at_once)
        masks = write_archive(folder, at_once)
        stills, book = list_stills([folder / "a"]), MaskBook(folder / "m")
        assert [still.source.stem for still in stills] == ["1", "2", "0"]
        for still in stills:
            labeller, mask = book.read(still.source, still.index, still.time, GRID, 1)
            assert labeller == "test"
            np.testing.assert_array_equal(mask, masks[int(still.source.stem)])
    assert len(list_stills([folder / "a"], 2)) == 2
    with pytest.raises(BadInput, match=r"3\.mask\.nc, or a file that has 2009"):
        book.read(folder / "3.nc", 0, cftime.DatetimeNoLeap(2009, 1, 1), GRID, 1)
    with pytest.raises(BadInput, match="1 or more"):
        list_stills([folder / "a"], 0)


def test_the_stamp_says_the_time_and_whose_calendar():
    assert time_stamp(cftime.DatetimeGregorian(2011, 10, 11, 6), 0, "") == "2011-10-11 06:00 UTC"
    assert time_stamp(TIMES[0], 0, "") == "2001-05-01 00:00 UTC (noleap calendar)"
    assert time_stamp(None, 3, "") == "step 3"


def test_a_film_of_an_archive(tmp_path):
    write_archive(tmp_path)
    seen = []
    path, frames = draw_film(
        [tmp_path / "a"], [tmp_path / "m"], tmp_path / "film.gif", every=2, progress=lambda *now: seen.append(now)
    )
    assert frames == 2
    assert seen == [(1, 2), (2, 2)]
    with Image.open(path) as film:
        assert film.n_frames == 2  # pyright: ignore[reportAttributeAccessIssue]
        assert 900 < film.size[0] < 1400
        first = np.asarray(film.convert("RGB")).astype(int)
        film.seek(1)
        second = np.asarray(film.convert("RGB")).astype(int)
    red = [(picture[..., 0] - picture[..., 2] > 60) for picture in (first, second)]
    assert all(one.sum() > 100 for one in red)
    assert (red[0] != red[1]).sum() > 100, "the cyclone moves"
    with pytest.raises(BadInput, match="pictures a second"):
        draw_film([tmp_path / "a"], [], tmp_path / "film.gif", frames_per_s=0.0)


def test_mp4_needs_an_ffmpeg_and_says_what_it_said(tmp_path, monkeypatch):
    write_archive(tmp_path)
    monkeypatch.setattr(animation, "map_figure", lambda *_, **__: None)
    monkeypatch.setattr(animation, "_pixels", lambda _: np.zeros((4, 6, 3), np.uint8))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(BadInput, match="ffmpeg on the PATH"):
        draw_film([tmp_path / "a"], [], tmp_path / "film.mp4")
    program = tmp_path / "ffmpeg"
    program.write_text('#!/bin/sh\nfor last; do :; done\n/bin/cat > "$last"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path, _ = draw_film([tmp_path / "a"], [], tmp_path / "film.mp4")
    assert path.stat().st_size == 3 * 4 * 6 * 3, "all pictures, raw"
    path.unlink()
    program.write_text("#!/bin/sh\necho no such encoder >&2\nexit 1\n")
    with pytest.raises(BadInput, match="no such encoder"):
        draw_film([tmp_path / "a"], [], tmp_path / "film.mp4")
    assert not path.exists()


def test_mp4_by_a_real_ffmpeg_has_every_picture(tmp_path, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    write_archive(tmp_path)
    shades, numbers = [(215, 25, 28), (31, 111, 214), (240, 240, 240)], iter(range(3))
    monkeypatch.setattr(animation, "map_figure", lambda *_, **__: None)
    monkeypatch.setattr(animation, "_pixels", lambda _: np.full((48, 64, 3), shades[next(numbers)], np.uint8))
    path, frames = draw_film([tmp_path / "a"], [tmp_path / "m"], tmp_path / "film.mp4", frames_per_s=5.0)
    assert frames == 3
    read = [animation._ffmpeg(), "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(read, check=True, capture_output=True).stdout
    shown = np.frombuffer(raw, np.uint8).reshape(-1, 48, 64, 3)
    assert len(shown) == 3
    np.testing.assert_allclose(shown.mean(axis=(1, 2)), shades, atol=8)
