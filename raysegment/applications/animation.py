"""A sequence of pictures as one film: an animated GIF, or MP4 where ffmpeg is installed; one picture in memory at a time.

GIF is written here frame after frame, because Pillow's and matplotlib's writers keep all frames until the end: a palette
of the few colours that these maps have, and of each frame the rectangle that differs from the one before.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import GifImagePlugin, Image, ImageColor

from raysegment.applications.canvas import COAST, FILL, MIDDLE_DEG
from raysegment.applications.drawable import Drawable
from raysegment.applications.maps import STANDARD, Palette, load_pyplot, map_figure, palette_of, shade_limits
from raysegment.applications.pictures import MaskBook, Still, list_stills, scene_of
from raysegment.applications.projections import AUTO, projection_of
from raysegment.archive.files import committed
from raysegment.climate.checks import BadInput

FILMS = (".gif", ".mp4")
_COLUMN_IN, _MOST_IN = 9.5, 17.0  # 1045 pixels for one labeller
_LIMIT_STILLS = 8  # maps from which the common grey scale is taken
_COLOURS = 256


def is_film(path: str | Path) -> bool:
    """Whether a name ends as a film's does."""
    return Path(path).suffix.lower() in FILMS


def draw_film(
    sources: Sequence[str | Path],
    masks: Sequence[str | Path],
    out: str | Path,
    field: str = "TMQ",
    colours: str = STANDARD,
    frames_per_s: float = 4.0,
    every: int = 1,
    projection: str = AUTO,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, int]:
    """All times of the sources, in order, each with its masks (a column for each of `masks`) → `out` and how many there are."""
    if not 0 < frames_per_s <= 50:
        raise BadInput("--fps", "more than 0 and at most 50 pictures a second", frames_per_s, "Write for example --fps 4")
    palette, out = palette_of(colours), Path(out)
    projection_of(projection, MIDDLE_DEG)  # a name that is none is said before anything is drawn
    books, stills = [MaskBook(path) for path in masks], list_stills(sources, every)
    limits = _common_limits(stills, field)
    width_in = min(_COLUMN_IN * max(1, len(books)), _MOST_IN)
    with committed(out) as temporary, _writer(out, temporary, palette, frames_per_s) as write:
        for number, still in enumerate(stills):
            scene = scene_of(still.source, still.index, books, field, limits=limits)
            write(_pixels(map_figure(scene, palette, width_in, projection=projection)))
            if progress:
                progress(number + 1, len(stills))
    return out, len(stills)


def _common_limits(stills: Sequence[Still], field: str) -> tuple[float, float]:
    """Ends of one grey scale for all pictures, from a few of them spread over the whole time."""
    chosen = {round(place) for place in np.linspace(0, len(stills) - 1, min(_LIMIT_STILLS, len(stills)))}
    ends = []
    for place in sorted(chosen):
        with Drawable(stills[place].source) as opened:
            ends.append(shade_limits(opened.read(field, stills[place].index)[0]))
    return min(low for low, _ in ends), max(high for _, high in ends)


def _pixels(figure) -> NDArray[np.uint8]:
    """The picture (h, w, 3) of a figure, of even height and width as video wants them; closes it."""
    figure.canvas.draw()
    rgb = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    even = np.ascontiguousarray(rgb[: rgb.shape[0] // 2 * 2, : rgb.shape[1] // 2 * 2])
    figure.clear()
    load_pyplot().close(figure)
    gc.collect()  # a figure and its parts hold each other; Python would keep dozens of them before it looks
    return even


@contextmanager
def _writer(out: Path, temporary: Path, palette: Palette, frames_per_s: float) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """What takes the pictures one by one; the film is complete when it is left."""
    if out.suffix.lower() == ".gif":
        with temporary.open("wb") as file:
            film = GifFilm(file, film_palette(palette), frames_per_s)
            yield film.add
            film.close()
        return
    program = _ffmpeg()
    if program is None:
        remedy = "Install ffmpeg, or `pip install imageio-ffmpeg`, or choose a name that ends in .gif"
        raise BadInput(out, "ffmpeg on the PATH for MP4", "none", remedy)
    video = Mp4Film(program, temporary, frames_per_s)
    try:
        yield video.add
        video.close()
    finally:
        video.stop()


def _ffmpeg() -> str | None:
    """An ffmpeg: the machine's own, else the one that the package imageio-ffmpeg brings; None without."""
    if own := shutil.which("ffmpeg"):
        return own
    try:
        import imageio_ffmpeg
    except ImportError:
        return None
    return imageio_ffmpeg.get_ffmpeg_exe()


class GifFilm:
    """Writes pictures (h, w, 3) of one size into an endless animated GIF as they come."""

    def __init__(self, file: IO[bytes], palette: Sequence[int], frames_per_s: float):
        self._file, self._palette = file, Image.new("P", (1, 1))
        self._palette.putpalette(palette)
        self._colours, self._duration_ms = bytes(palette), round(1000.0 / frames_per_s)
        self._last: NDArray[np.uint8] | None = None

    def add(self, rgb: NDArray[np.uint8]) -> None:
        """The next picture; only what differs from the one before is written."""
        frame = Image.fromarray(rgb).quantize(palette=self._palette, dither=Image.Dither.NONE)
        now = np.asarray(frame)
        if self._last is None:
            self._begin(*frame.size)
            top, left, part = 0, 0, frame
        else:
            assert now.shape == self._last.shape, (now.shape, self._last.shape)
            rows, columns = (np.flatnonzero((now != self._last).any(axis=axis)) for axis in (1, 0))
            top, bottom = (int(rows[0]), int(rows[-1]) + 1) if rows.size else (0, 1)
            left, right = (int(columns[0]), int(columns[-1]) + 1) if columns.size else (0, 1)
            part = frame.crop((left, top, right, bottom))
        self._file.write(b"".join(GifImagePlugin.getdata(part, (left, top), duration=self._duration_ms)))
        self._last = now

    def close(self) -> None:
        """End the film."""
        self._file.write(b";")

    def _begin(self, width: int, height: int) -> None:
        """Header with the palette of all frames, and the extension that makes it go on for ever (GIF89a, Netscape 2.0)."""
        size = width.to_bytes(2, "little") + height.to_bytes(2, "little")
        self._file.write(b"GIF89a" + size + b"\xf7\x00\x00" + self._colours + b"!\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")


class Mp4Film:
    """Gives pictures (h, w, 3) of one size to an ffmpeg that writes H.264 as they come."""

    def __init__(self, program: str, path: Path, frames_per_s: float):
        self._program, self._path, self._frames_per_s = program, path, frames_per_s
        self._process: subprocess.Popen[bytes] | None = None

    def add(self, rgb: NDArray[np.uint8]) -> None:
        """The next picture."""
        if self._process is None:
            self._process = self._start(rgb.shape[1], rgb.shape[0])
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(rgb.tobytes())
        except BrokenPipeError:
            self.close()

    def close(self) -> None:
        """End the film; an error of ffmpeg's is raised in its own words."""
        if self._process is not None:
            _, said = self._process.communicate()
            if self._process.returncode:
                words = said.decode("utf-8", "replace").strip() or f"exit code {self._process.returncode}"
                raise BadInput(self._path, "ffmpeg to write H.264", words, "Check ffmpeg, or choose a name that ends in .gif")

    def stop(self) -> None:
        """Leave no process behind."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _start(self, width: int, height: int) -> subprocess.Popen[bytes]:
        taken = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{self._frames_per_s:g}", "-i", "-"]
        made = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "18", "-f", "mp4", str(self._path)]
        command = [self._program, "-v", "error", "-y", *taken, *made]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)


def film_palette(palette: Palette) -> list[int]:
    """At most 256 colours (as 768 numbers) that maps are drawn in: greys, both classes over them, coast and stars."""
    greys = np.append(np.arange(0, 252, 4), 255)[:, None].repeat(3, axis=1)  # Pillow matches in steps of 4: white stays white
    light = np.linspace(80, 255, 22)[:, None].repeat(3, axis=1)
    colours = [greys]
    for name in (palette.cyclone, palette.river):
        full = np.array(ImageColor.getrgb(name))
        filled = FILL * full + (1 - FILL) * light
        colours += [filled, *(share * full + (1 - share) * light[::5] for share in (1.0, 0.8, 0.6, 0.45))]
    coast = np.array(ImageColor.getrgb(COAST))
    colours += [share * coast + (1 - share) * light[::4] for share in (1.0, 0.7, 0.4, 0.2)]
    colours += [np.array([[255, 212, 0], [200, 166, 0], [120, 100, 0], [255, 235, 140]])]
    numbers = np.unique(np.rint(np.concatenate(colours)).astype(int), axis=0)
    assert len(numbers) <= _COLOURS, len(numbers)
    return [*numbers.ravel().tolist(), *[0] * (3 * (_COLOURS - len(numbers)))]
