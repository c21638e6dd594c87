"""TIFF files that are read and written piece by piece, with their georeference."""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .utils import LARGE_PICTURE, atomic_path
from .visualization import drawn_step

TILE = 512  # pixels of a written tile's sides
GEOREFERENCE = {
    33550: 'ModelPixelScale', 33922: 'ModelTiepoint', 34264: 'ModelTransformation',
    34735: 'GeoKeyDirectory', 34736: 'GeoDoubleParams', 34737: 'GeoAsciiParams'}
"""Tags of the GeoTIFF standard (OGC 19-008r4, section 7)."""
NODATA = 42113  # GDAL's tag


class DamagedTiff(ValueError):
    """A TIFF file is truncated, or one of its strips or tiles cannot be decoded."""


class NotByRows(ValueError):
    """A file cannot be read piece by piece as a pipeline would load it."""


class TiffReader:
    """Reads rows of a large TIFF file from the top; decodes only the strips or tiles of them.

    Args:
        path: The file.
        step: Config of a pipeline's loading step; rows are what it would load.

    Attributes:
        size: Height and width.
        bands: Number of bands that the step loads.
        small: The rows that have been read, at the resolution at which they are drawn.

    Raises:
        DamagedTiff: The file is truncated or damaged.
        NotByRows: The picture is small, the step would load something else than the first page
            as it is, or a package that decodes it is missing.
    """

    def __init__(self, path: str, step: Mapping[str, Any]) -> None:
        try:
            import tifffile
        except ImportError:
            raise NotByRows("tifffile is not installed: pip install 'convnext-mm[tiff]'") from None
        with open(path, 'rb') as file:
            if file.read(4)[:2] not in (b'II', b'MM'):
                raise NotByRows('not a TIFF file')
        self._file = tifffile.TiffFile(path)
        try:
            self._inspect(step)
            self._segment(0)  # fails here if it cannot be decoded
        except Exception:
            self._file.close()
            raise

    def _inspect(self, step: Mapping[str, Any]) -> None:
        page: Any = self._file.pages[0]
        self._page = page
        self.size = (int(page.imagelength), int(page.imagewidth))
        if self.size[0] * self.size[1] <= LARGE_PICTURE:
            raise NotByRows('it is small')
        series = self._file.series[0]
        self.bands = int(page.samplesperpixel)
        self.dtype = np.dtype(page.dtype)
        self._reversed = step.get('imdecode_backend', 'cv2') != 'tifffile'
        if len(series.pages) != 1 or series.shape != page.shape or page.planarconfig != 1 or (
                page.imagedepth != 1):
            raise NotByRows('its first image is not one page of height × width × bands')
        if self._reversed:
            orientation = page.tags.get('Orientation')
            kinds = dict(color=((2, 3), (2, 4), (1, 1)), grayscale=((1, 1),))
            color_type = step.get('color_type', 'color')
            if (self.dtype != np.uint8
                    or (page.photometric, self.bands) not in kinds.get(color_type, ())
                    or 2 in page.extrasamples  # a transparency that OpenCV applies
                    or (orientation and orientation.value != 1)):
                raise NotByRows('the pipeline converts its colors')
            self.bands = 3 if color_type == 'color' else 1
        self._to_float = bool(step.get('to_float32'))
        ends = [offset + count for offset, count in zip(
            page.dataoffsets, page.databytecounts, strict=True) if count]
        length = self._file.filehandle.size
        if max(ends, default=0) > length:
            raise DamagedTiff(f'truncated: it has {length} of at least {max(ends)} bytes')
        self._kept: dict[int, np.ndarray] = {}
        self._every = drawn_step(self.size)
        self.small: np.ndarray | None = None
        self._height = int(page.tilelength if page.is_tiled else page.rowsperstrip)
        self._height = min(self._height, self.size[0])
        self._width = int(page.tilewidth) if page.is_tiled else self.size[1]
        self._columns = math.ceil(self.size[1] / self._width)

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows (bottom - top, W, bands) as the pipeline loads them; top never decreases."""
        first, last = top // self._height, (bottom - 1) // self._height
        for i in [i for i in self._kept if i < first]:
            del self._kept[i]
        for i in range(first, last + 1):
            if i not in self._kept:
                self._kept[i] = self._segment_row(i)
        start = first * self._height
        return np.concatenate([self._kept[i] for i in range(first, last + 1)])[
            top - start:bottom - start]

    def _segment_row(self, index: int) -> np.ndarray:
        height = min(self._height, self.size[0] - index * self._height)
        out = np.empty((height, self.size[1], self._page.samplesperpixel), self.dtype)
        for column in range(self._columns):
            left = column * self._width
            part = out[:, left:left + self._width]
            segment = self._segment(index * self._columns + column)[:height, :part.shape[1]]
            if segment.shape != part.shape:
                raise DamagedTiff(f'a strip or tile at row {index * self._height} is too short')
            part[:] = segment
        if self._reversed and self.bands == 3:
            out = np.repeat(out, 3, 2) if out.shape[2] == 1 else out[..., 2::-1]
        if self._to_float:
            out = out.astype(np.float32)
        every = self._every
        if self.small is None:
            self.small = np.zeros((-(-self.size[0] // every), -(-self.size[1] // every),
                                   self.bands), out.dtype)
        keep_every(out, index * self._height, every, self.small)
        return out

    def _segment(self, index: int) -> np.ndarray:
        """A strip or tile (h, w, bands)."""
        page, handle = self._page, self._file.filehandle
        count = page.databytecounts[index]
        if not count:  # a sparse file has no data for it
            return np.full((self._height, self._width, page.samplesperpixel), page.nodata,
                           self.dtype)
        handle.seek(page.dataoffsets[index])
        try:
            segment, _, _ = page.decode(handle.read(count), index)
        except Exception as error:  # decoders raise errors of any type
            if 'imagecodecs' in str(error):
                raise NotByRows(f'its compression, {page.compression.name}, needs the package '
                                 'imagecodecs: pip install imagecodecs') from error
            raise DamagedTiff(f'strip or tile {index} is damaged: {error}') from error
        if segment is None:
            raise DamagedTiff(f'strip or tile {index} is damaged')
        return segment[0]


def keep_every(rows: np.ndarray, start: int, every: int, small: np.ndarray) -> None:
    """Put every few pixels of rows that begin at ``start`` to their places in a small picture."""
    first = -(-start // every)
    part = rows[first * every - start::every, ::every]
    small[first:first + len(part)] = part


def read_georeference(path: str, count: int) -> list[tuple]:
    """The tags of a GeoTIFF file that hold for a class map of it, too, as tifffile writes them.

    Args:
        path: A TIFF file.
        count: Number of values in the class map. The file's "no data" value holds only if it is
            none of them.
    """
    import tifffile
    with tifffile.TiffFile(path) as file:
        page: Any = file.pages[0]
        tags = page.tags
        codes = [*GEOREFERENCE]
        nodata = tags.get(NODATA)
        try:
            if nodata and count <= float(nodata.value) <= 255:
                codes.append(NODATA)
        except ValueError:  # text that is no number
            pass
        return [(tag.code, tag.dtype, tag.count, tag.value, True)
                for code in codes if (tag := tags.get(code)) is not None]


def write_class_map(path: Path, rows: Iterable[np.ndarray], size: tuple[int, int], dtype: Any,
                    tags: list[tuple]) -> None:
    """Write a class map to a compressed TIFF file of tiles, as its rows come.

    Args:
        path: The file, which is complete or absent.
        rows: Blocks of rows (n, W), from the top.
        size: Height and width.
        dtype: Of the file.
        tags: Further tags, as :func:`read_georeference` returns them.

    Raises:
        OSError: The file cannot be written.
    """
    import tifffile
    rows = iter(rows)
    with atomic_path(path) as part:
        tifffile.imwrite(part, _tiles(rows, size, dtype), shape=size, dtype=dtype,
                         tile=(TILE, TILE), compression='zlib', photometric='minisblack',
                         metadata=None, extratags=tags)
    next(rows, None)  # tifffile stops at the last tile, and so before the rows' own end


def _tiles(rows: Iterable[np.ndarray], size: tuple[int, int], dtype: Any) -> Iterator[np.ndarray]:
    buffer, filled, done = np.zeros((TILE, size[1]), dtype), 0, 0
    for block in rows:
        while len(block):
            taken = block[:TILE - filled]
            buffer[filled:filled + len(taken)] = taken
            filled, done, block = filled + len(taken), done + len(taken), block[len(taken):]
            if filled == TILE or done == size[0]:
                for left in range(0, size[1], TILE):
                    yield buffer[:filled, left:left + TILE].copy()
                filled = 0
