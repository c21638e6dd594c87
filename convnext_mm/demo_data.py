"""A small synthetic dataset for segmentation and detection, generated from a seed.

Two textured backgrounds meet along a wavy line. Balls, crates, stars and leaves lie on them,
with shading, shadows and occlusion. The color ranges of the classes overlap, so a model has to
learn texture and shape. Segmentation labels all eight classes, detection the four object classes.
"""
from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

from .errors import UserError

STUFF = ('sand', 'water', 'brick', 'grass')
THINGS = ('ball', 'crate', 'star', 'leaf')
CLASSES = STUFF + THINGS

SPLITS = {'train': ('training', 'train2017'), 'val': ('validation', 'val2017')}
"""Folder of each split in the ADE20K layout and in the COCO layout."""
STAMP = 'demo_data.json'
VERSION = 2
"""Increase it when the files change, so that existing demo data is regenerated."""
SHADOW_SHIFT = np.array([[1, 0, 4], [0, 1, 3]], np.float32)

Rng = np.random.Generator


def make(root: str | Path, num_train: int = 400, num_val: int = 80, seed: int = 0) -> Path:
    """Write the dataset as ``root/ADEChallengeData2016`` and ``root/coco``.

    Both contain the same images, with the file names and label conventions of ADE20K (masks,
    0 for "no class") and COCO (boxes and polygons). The same arguments give the same bytes. If
    ``root`` already contains the requested dataset, nothing is written.

    Args:
        root: Output folder. It appears only once the dataset is complete.
        num_train: Number of training images.
        num_val: Number of validation images.
        seed: Seed of the random number generator.

    Returns:
        ``root``.

    Raises:
        UserError: ``root`` contains files that this function did not write.
    """
    root = Path(root)
    wanted = dict(version=VERSION, num_train=num_train, num_val=num_val, seed=seed,
                  classes=list(CLASSES))
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        stamp = root / STAMP
        if not stamp.is_file():
            raise UserError(f'{root.absolute()} already exists and was not made by this tool: '
                            'choose another folder with --out')
        if json.loads(stamp.read_text()) == wanted:
            return root
        shutil.rmtree(root)
    partial = root.with_name(root.name + '.part')
    shutil.rmtree(partial, ignore_errors=True)
    for split, count in (('train', num_train), ('val', num_val)):
        _write_split(partial, split, count, np.random.default_rng([seed, split == 'val']))
    (partial / STAMP).write_text(json.dumps(wanted))
    root.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(root)
    return root


def _write_split(root: Path, split: str, count: int, rng: Rng) -> None:
    ade, coco = SPLITS[split]
    images = root / 'ADEChallengeData2016' / 'images' / ade
    masks = root / 'ADEChallengeData2016' / 'annotations' / ade
    copies = root / 'coco' / coco
    annotations = root / 'coco' / 'annotations'
    for folder in (images, masks, copies, annotations):
        folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, list] = dict(images=[], annotations=[], categories=[
        dict(id=i, name=name) for i, name in enumerate(THINGS, 1)])
    for index in track(range(1, count + 1), f'Drawing {count} images ({split})'):
        image, labels, instances = draw_scene(rng)
        name = f'ADE_{split}_{index:08d}'
        cv2.imwrite(str(images / f'{name}.jpg'), image, [cv2.IMWRITE_JPEG_QUALITY, 92])
        cv2.imwrite(str(masks / f'{name}.png'), labels)
        shutil.copy(images / f'{name}.jpg', copies / f'{index:012d}.jpg')
        height, width = labels.shape
        content['images'].append(
            dict(id=index, file_name=f'{index:012d}.jpg', height=height, width=width))
        for kind, mask in instances:
            x, y, w, h = cv2.boundingRect(mask)
            content['annotations'].append(dict(
                id=len(content['annotations']) + 1, image_id=index,
                category_id=THINGS.index(kind) + 1, iscrowd=0, area=int(mask.sum()),
                bbox=[x, y, w, h], segmentation=_polygons(mask)))
    (annotations / f'instances_{coco}.json').write_text(json.dumps(content))


def _polygons(mask: np.ndarray) -> list[list[float]]:
    """Outline a (H, W) 0/1 mask with polygons in COCO's coordinates.

    The vertices are corners of pixels, and pixel (x, y) covers [x, x + 1] x [y, y + 1]. Hence
    pycocotools decodes exactly ``mask`` from the polygons. They are floats as in COCO: mmdet's
    PolygonMasks would truncate integers when an image is resized.
    """
    # findContours returns centers of border pixels, not corners. With each pixel enlarged to 3x3,
    # every such center is next to the corner that it stands for, and rounding finds this corner.
    enlarged = mask.repeat(3, axis=0).repeat(3, axis=1)
    outlines, hierarchy = cv2.findContours(enlarged, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    holes = [outline for outline, parent in zip(outlines, hierarchy[0, :, 3], strict=True)
             if parent >= 0]
    if holes:  # COCO's polygons have no holes: cut the mask in two through the first one
        x, _, width, _ = cv2.boundingRect(holes[0])
        left = mask.copy()
        left[:, (x + width // 2) // 3:] = 0
        return _polygons(left) + _polygons(mask - left)
    polygons = []
    for outline in outlines:
        corners = np.round(outline[:, 0] / 3)
        repeated = (corners == np.roll(corners, 1, axis=0)).all(axis=1)
        polygons.append(corners[~repeated].ravel().tolist())
    return polygons


def draw_scene(rng: Rng) -> tuple[np.ndarray, np.ndarray, list[tuple[str, np.ndarray]]]:
    """Draw one image.

    Returns:
        The BGR image (H, W, 3) uint8; the labels (H, W) uint8, 1 to 8 in the order of ``CLASSES``;
        the class name and the visible mask (H, W) uint8 of each object.
    """
    height, width = (int(v) for v in rng.choice([128, 144, 160], 2))
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    below, above = rng.choice(STUFF, 2, replace=False)
    wave = (height * rng.uniform(0.3, 0.7) + rng.uniform(-0.3, 0.3) * (xs - width / 2)
            + rng.uniform(2, 10) * np.sin(xs / rng.uniform(12, 30) + rng.uniform(0, 6)))
    border = ys > wave
    image = np.where(border[..., None], _ground(below, xs, ys, rng), _ground(above, xs, ys, rng))
    labels = np.where(border, CLASSES.index(below) + 1, CLASSES.index(above) + 1).astype(np.uint8)

    owner = np.full((height, width), -1)
    kinds: list[str] = []
    for _ in range(rng.integers(2, 6)):
        kind = str(rng.choice(THINGS))
        radius = rng.uniform(16, 34)
        x, y = rng.uniform(radius * 0.6, np.array([width, height]) - radius * 0.6)
        angle = rng.uniform(0, 2 * math.pi)
        # Coordinates of the object: (0, 0) at its center, rotated, 1 at its radius.
        u = ((xs - x) * math.cos(angle) + (ys - y) * math.sin(angle)) / radius
        v = ((ys - y) * math.cos(angle) - (xs - x) * math.sin(angle)) / radius
        inside = SHAPES[kind](u, v)
        shadow = cv2.warpAffine(inside.astype(np.uint8), SHADOW_SHIFT, (width, height))
        image = np.where(shadow[..., None] > 0, image * 0.6, image)
        surface = _surface(kind, u, v, rng)
        light = 1.1 - 0.45 * ((xs - x) + (ys - y))[..., None] / (2 * radius)
        image = np.where(inside[..., None], surface * light, image)
        owner[inside] = len(kinds)
        labels[inside] = CLASSES.index(kind) + 1
        kinds.append(kind)

    slope = rng.uniform(-0.25, 0.25, 2)
    image = image * (1 + slope[0] * (xs / width - 0.5) + slope[1] * (ys / height - 0.5))[..., None]
    image = cv2.GaussianBlur(image.astype(np.float32), (3, 3), rng.uniform(0.3, 0.8))
    image = image + rng.normal(0, rng.uniform(2, 7), image.shape)
    masks = [(kind, (owner == i).astype(np.uint8)) for i, kind in enumerate(kinds)]
    # Objects that are almost completely hidden are not annotated.
    return (image.clip(0, 255).astype(np.uint8), labels,
            [(kind, mask) for kind, mask in masks if mask.sum() >= 60])


def _color(hue: float, saturation: float, value: float) -> np.ndarray:
    """BGR in 0–255 from a hue in degrees, and saturation and value in 0–1."""
    hsv = np.array([[[hue % 360 / 2, saturation * 255, value * 255]]]).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)


def _noise(shape: tuple[int, ...], cell: tuple[float, float], rng: Rng) -> np.ndarray:
    """Smooth noise in 0–1 with spots of ``cell`` = (height, width) pixels."""
    small = rng.random((max(2, int(shape[0] / cell[0])), max(2, int(shape[1] / cell[1]))))
    return cv2.resize(small.astype(np.float32), shape[::-1], interpolation=cv2.INTER_CUBIC)


def _ground(kind: str, xs: np.ndarray, ys: np.ndarray, rng: Rng) -> np.ndarray:
    """A (H, W, 3) texture of a background class."""
    shape = xs.shape
    if kind == 'sand':
        color = _color(rng.uniform(20, 60), rng.uniform(0.15, 0.5), rng.uniform(0.6, 0.9))
        shade = 0.75 + 0.3 * _noise(shape, (2, 2), rng) + 0.15 * _noise(shape, (20, 20), rng)
    elif kind == 'water':
        color = _color(rng.uniform(150, 240), rng.uniform(0.3, 0.8), rng.uniform(0.5, 0.9))
        ripple = np.sin(ys / rng.uniform(1.2, 2.2) + 5 * _noise(shape, (14, 24), rng))
        shade = 0.9 + 0.2 * ripple
    elif kind == 'brick':
        color = _color(rng.uniform(-15, 40), rng.uniform(0.2, 0.7), rng.uniform(0.4, 0.8))
        height, length = rng.uniform(8, 11), rng.uniform(18, 24)
        row = np.floor(ys / height)
        column = xs / length + row % 2 / 2
        seam = (ys % height < 2) | (column % 1 * length < 2)
        tone = rng.uniform(0.8, 1.15, (40, 40))[row.astype(int) % 40,
                                                np.floor(column).astype(int) % 40]
        shade = np.where(seam, 1.5, tone) * (0.9 + 0.2 * _noise(shape, (2, 2), rng))
    else:  # grass
        color = _color(rng.uniform(60, 150), rng.uniform(0.35, 0.8), rng.uniform(0.4, 0.8))
        shade = 0.55 + 0.9 * _noise(shape, (9, 1.6), rng)
    return color * shade[..., None]


def _surface(kind: str, u: np.ndarray, v: np.ndarray, rng: Rng) -> np.ndarray:
    """A (H, W, 3) texture of an object at its coordinates (u, v), 1 at its radius."""
    hues = dict(ball=(0, 360), crate=(15, 55), star=(260, 400), leaf=(60, 150))
    color = _color(rng.uniform(*hues[kind]), rng.uniform(0.5, 0.95), rng.uniform(0.6, 0.95))
    if kind == 'ball':
        other = _color(rng.uniform(0, 360), rng.uniform(0, 0.3), rng.uniform(0.8, 1))
        return np.where((np.sin(u * 7 + v * v) > 0)[..., None], color, other)
    if kind == 'crate':
        frame = (np.maximum(np.abs(u), np.abs(v)) > 0.6) | (np.abs(u - v) < 0.14)
        return color * np.where(frame, 1.1, 0.55)[..., None]
    if kind == 'star':
        return color * (1.25 - 0.7 * np.hypot(u, v))[..., None]
    vein = (np.abs(v) < 0.07) | (np.abs(np.sin((u - np.abs(v)) * 9)) < 0.2)
    return color * np.where(vein, 0.5, 0.95)[..., None]


def _ball(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) < 0.85


def _crate(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) < 0.8


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    tip = np.abs((np.arctan2(v, u) / (2 * math.pi) * 5) % 1 - 0.5) * 2  # 1 at tips, 0 between
    return np.hypot(u, v) < 0.42 / (1 - 0.6 * tip ** 1.2)


def _leaf(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(v) < 0.48 * np.cos(u.clip(-1, 1) * math.pi / 2)


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = dict(
    ball=_ball, crate=_crate, star=_star, leaf=_leaf)
"""For each object class, whether the points (u, v) are inside the object."""
