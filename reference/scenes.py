"""Scenes: procedurally rendered 128x128 pictures of one or two objects, with the truth behind them.

In: a seeded generator and a split. Out: `Scene` records (discrete attributes plus continuous jitter) and, from
`render`, float32 RGB arrays (N, size, size, 3) in [0, 1]. Every shape is a signed distance field, so edges are
antialiased at any size and a scene renders alike at 64 and at 128 pixels. Captions live in `captions.py`.

Splits are disjoint by construction: the discrete part of a scene is hashed into a bucket and each split owns its
buckets. Some (shape, colour) pairs belong to no training split at all (`HELD_OUT_PAIRS`). This is not a 3-D
renderer: light, shadow and highlight are painted from the distance field.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("studio", "dusk", "meadow", "sand")
LAYOUTS = ("single", "horizontal", "vertical")

RGB = np.array(
    [
        [0.86, 0.13, 0.13],
        [0.97, 0.52, 0.08],
        [0.97, 0.88, 0.16],
        [0.16, 0.62, 0.22],
        [0.20, 0.82, 0.86],
        [0.14, 0.28, 0.86],
        [0.56, 0.18, 0.72],
        [0.95, 0.95, 0.95],
    ],
    dtype=np.float32,
)

# One pair a shape that no training split contains; `Split = "held_out"` asks for scenes with at least one of them.
HELD_OUT_PAIRS = frozenset(
    {
        ("circle", "purple"),
        ("square", "yellow"),
        ("triangle", "cyan"),
        ("star", "green"),
        ("ring", "red"),
        ("cross", "blue"),
    }
)

Split = Literal["train", "calibrate", "gate", "report", "held_out"]
# Buckets of a hundred that each split owns. `held_out` is chosen by attribute pair instead.
_BUCKETS: dict[str, range] = {
    "train": range(0, 85),
    "calibrate": range(85, 90),
    "gate": range(90, 95),
    "report": range(95, 100),
    "held_out": range(0, 100),
}
_SPLIT_SEED = {"train": 1, "calibrate": 2, "gate": 3, "report": 4, "held_out": 5}

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SceneObject:
    """One object: its named attributes, then where it sits (fractions of the picture's side) and its jitter."""

    shape: str
    colour: str
    size: str
    texture: str
    centre: tuple[float, float]  # x, y in 0..1, y downwards
    radius: float  # of the circumscribed circle, in picture sides
    tint: tuple[float, float, float]  # added to the colour

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        """The discrete part: shape, colour, size, texture."""
        return self.shape, self.colour, self.size, self.texture


@dataclass(frozen=True)
class Scene:
    """One or two objects. With two, `relation` says where `objects[0]` is seen from `objects[1]`."""

    objects: tuple[SceneObject, ...]
    relation: str | None
    background: str
    light: float  # brightness of the background, about 1

    @property
    def key(self) -> str:
        """The discrete attributes as text: two scenes with the same key differ in jitter alone.

        A pair is written left to right or top to bottom, so that both ways to say it share a key.
        """
        first, second = self.spatial_order()
        parts = [",".join(first.attributes)] + ([",".join(second.attributes)] if second else [])
        return "|".join([self.layout, *parts, self.background])

    @property
    def layout(self) -> str:
        """`single`, `horizontal` or `vertical`."""
        if self.relation is None:
            return "single"
        return "horizontal" if self.relation in ("left of", "right of") else "vertical"

    def spatial_order(self) -> tuple[SceneObject, SceneObject | None]:
        """The objects left to right or top to bottom; the second is None in a scene of one."""
        if len(self.objects) == 1:
            return self.objects[0], None
        first, second = self.objects
        return (first, second) if self.relation in ("left of", "above") else (second, first)

    @property
    def held_out(self) -> bool:
        """Whether some object has a (shape, colour) pair kept out of training."""
        return any((item.shape, item.colour) in HELD_OUT_PAIRS for item in self.objects)


def bucket(scene: Scene) -> int:
    """0..99 from the scene's discrete attributes, the same on every machine."""
    return int.from_bytes(hashlib.sha256(scene.key.encode()).digest()[:4], "big") % 100


def in_split(scene: Scene, split: Split) -> bool:
    """Whether the scene may appear in the split."""
    if split == "held_out":
        return scene.held_out
    return not scene.held_out and bucket(scene) in _BUCKETS[split]


def sample_scene(rng: np.random.Generator) -> Scene:
    """One scene from the whole distribution, two objects two times out of three."""
    relation = str(rng.choice(RELATIONS)) if rng.random() < 2 / 3 else None
    centres = _centres(rng, relation)
    return Scene(
        objects=tuple(_sample_object(rng, centre) for centre in centres),
        relation=relation,
        background=str(rng.choice(BACKGROUNDS)),
        light=float(rng.uniform(0.92, 1.06)),
    )


def sample_scenes(split: Split, count: int, seed: int) -> list[Scene]:
    """`count` scenes of a split. The same split, count and seed give the same scenes everywhere; a larger count
    extends a smaller one."""
    if split not in _BUCKETS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(_BUCKETS)}")
    rng = np.random.Generator(np.random.PCG64([_SPLIT_SEED[split], seed]))
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if in_split(scene, split):
            scenes.append(scene)
    return scenes


def _centres(rng: np.random.Generator, relation: str | None) -> list[tuple[float, float]]:
    if relation is None:
        x, y = rng.uniform(0.4, 0.6, size=2)
        return [(float(x), float(y))]
    near, far = rng.uniform(0.255, 0.285), rng.uniform(0.715, 0.745)
    across = rng.uniform(0.42, 0.58, size=2)
    first, second = (near, far) if relation in ("left of", "above") else (far, near)
    if relation in ("left of", "right of"):
        return [(float(first), float(across[0])), (float(second), float(across[1]))]
    return [(float(across[0]), float(first)), (float(across[1]), float(second))]


def _sample_object(rng: np.random.Generator, centre: tuple[float, float]) -> SceneObject:
    size = str(rng.choice(SIZES))
    radius = rng.uniform(0.125, 0.145) if size == "small" else rng.uniform(0.205, 0.225)
    tint = rng.uniform(-0.04, 0.04, size=3)
    return SceneObject(
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(COLOURS)),
        size=size,
        texture=str(rng.choice(TEXTURES)),
        centre=centre,
        radius=float(radius),
        tint=(float(tint[0]), float(tint[1]), float(tint[2])),
    )


# ---- rendering -----------------------------------------------------------------------------------------------------


def render(scenes: Sequence[Scene], size: int = 128) -> Floats:
    """Pictures (N, size, size, 3), float32 in [0, 1]. All scenes are drawn together; no loop over pictures."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(axis, axis)
    image = _backgrounds(scenes, x, y)
    for slot in range(2):
        rows = np.array([i for i, scene in enumerate(scenes) if len(scene.objects) > slot], dtype=np.intp)
        if rows.size:
            _draw(image, rows, [scenes[i].objects[slot] for i in rows], x, y, size)
    np.clip(image, 0.0, 1.0, out=image)
    return image


def _backgrounds(scenes: Sequence[Scene], x: Floats, y: Floats) -> Floats:
    painted = np.stack([_BACKGROUND_PAINTERS[name](x, y) for name in BACKGROUNDS]).astype(np.float32)
    kinds = np.array([BACKGROUNDS.index(scene.background) for scene in scenes])
    light = np.array([scene.light for scene in scenes], dtype=np.float32)
    lit: Floats = painted[kinds] * light[:, None, None, None]
    return lit


def _blend(low: Sequence[float], high: Sequence[float], amount: Floats) -> Floats:
    return np.asarray(low, np.float32) + amount[..., None] * (
        np.asarray(high, np.float32) - np.asarray(low, np.float32)
    )


def _studio(x: Floats, y: Floats) -> Floats:
    return _blend((0.76, 0.76, 0.77), (0.46, 0.46, 0.49), np.clip(1.5 * ((x - 0.45) ** 2 + (y - 0.4) ** 2), 0, 1))


def _dusk(x: Floats, y: Floats) -> Floats:
    return _blend((0.12, 0.10, 0.24), (0.46, 0.26, 0.28), y**1.5)


def _meadow(x: Floats, y: Floats) -> Floats:
    floor: Floats = 1 / (1 + np.exp(-(y - 0.5) * 28))
    sky = _blend((0.66, 0.79, 0.90), (0.86, 0.91, 0.92), np.clip(y * 2, 0, 1))
    grass = _blend((0.52, 0.66, 0.38), (0.36, 0.52, 0.26), np.clip(y * 2 - 1, 0, 1))
    return sky + floor[..., None].astype(np.float32) * (grass - sky)


def _sand(x: Floats, y: Floats) -> Floats:
    waves = 0.5 + 0.5 * np.sin(2 * np.pi * (2.2 * y + 0.7 * x) + 0.8 * np.sin(2 * np.pi * 0.9 * x))
    return _blend((0.80, 0.69, 0.50), (0.90, 0.81, 0.63), waves.astype(np.float32))


_BACKGROUND_PAINTERS = {"studio": _studio, "dusk": _dusk, "meadow": _meadow, "sand": _sand}


def _draw(image: Floats, rows: NDArray[np.intp], items: list[SceneObject], x: Floats, y: Floats, size: int) -> None:
    """Paint one object onto each of `image[rows]` (modified in place)."""
    shapes = np.array([SHAPES.index(item.shape) for item in items])
    textures = np.array([TEXTURES.index(item.texture) for item in items])
    for shape_id in np.unique(shapes):
        chosen = np.flatnonzero(shapes == shape_id)
        radius = np.array([items[i].radius for i in chosen], dtype=np.float32)[:, None, None]
        centre = np.array([items[i].centre for i in chosen], dtype=np.float32)
        colour = np.clip(np.array([RGB[COLOURS.index(items[i].colour)] + items[i].tint for i in chosen]), 0, 1)
        dx = x[None] - centre[:, 0, None, None]
        dy = y[None] - centre[:, 1, None, None]
        u, v = dx / radius, dy / radius
        field = _FIELDS[SHAPES[shape_id]]

        canvas = image[rows[chosen]]
        shadow = _smooth(-field(u - 0.16, v - 0.22) / 0.30 + 0.5)
        canvas *= 1 - 0.42 * shadow[..., None]
        distance = field(u, v)
        cover = np.clip(0.5 - distance * radius * size, 0, 1)
        paint = _shade(u, v, distance) * _pattern(textures[chosen], dx, dy)
        glint = 0.5 * np.exp(-((u + 0.30) ** 2 + (v + 0.34) ** 2) / 0.035)
        surface = paint[..., None] * colour[:, None, None, :].astype(np.float32)
        surface += glint[..., None] * (1 - surface)
        canvas += cover[..., None] * (surface - canvas)
        image[rows[chosen]] = canvas


def _smooth(value: Floats) -> Floats:
    clipped: Floats = np.clip(value, 0, 1)
    return clipped * clipped * (3 - 2 * clipped)


def _shade(u: Floats, v: Floats, distance: Floats) -> Floats:
    """Light from the upper left, and a darker rim."""
    light: Floats = np.clip(0.95 - 0.16 * (u + v), 0.6, 1.15)
    rim: Floats = np.clip(1 + distance / 0.12, 0, 1)
    return light * (1 - 0.35 * rim)


def _pattern(textures: NDArray[np.intp], dx: Floats, dy: Floats) -> Floats:
    """Brightness of the texture, anchored at the object's centre; its period is the same at both object sizes."""
    period = np.float32(0.125)
    out = np.ones_like(dx)
    stripes = textures == TEXTURES.index("striped")
    if stripes.any():
        wave = np.cos(2 * np.pi * (dx[stripes] + dy[stripes]) / (1.25 * period))
        out[stripes] = 1 - 0.48 * _smooth(0.5 + 1.1 * wave)
    dots = textures == TEXTURES.index("dotted")
    if dots.any():
        wave = np.cos(2 * np.pi * dx[dots] / period) * 0.5 + np.cos(2 * np.pi * dy[dots] / period) * 0.5
        out[dots] = 1 - 0.52 * _smooth((wave - 0.05) / 0.55)
    return out


# Signed distances (negative inside) for a shape of unit circumradius; near enough to exact for one-pixel edges.


def _circle(u: Floats, v: Floats) -> Floats:
    distance: Floats = np.sqrt(u * u + v * v) - 0.92
    return distance


def _square(u: Floats, v: Floats) -> Floats:
    distance: Floats = np.maximum(np.abs(u), np.abs(v)) - 0.78
    return distance


def _triangle(u: Floats, v: Floats) -> Floats:
    distance: Floats = np.maximum(np.abs(u) * 0.8660254 - (v - 0.12) * 0.5 - 0.55, (v - 0.12) - 0.58)
    return distance


def _star(u: Floats, v: Floats) -> Floats:
    angle = np.arctan2(u, -v)
    sector = np.abs(np.mod(angle + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
    r = np.sqrt(u * u + v * v)
    a, b = r * np.cos(sector), r * np.sin(sector)
    # The edge from the tip (1.05, 0) to the notch at 36 degrees, radius 0.46.
    tip, notch = (1.05, 0.0), (0.46 * np.cos(np.pi / 5), 0.46 * np.sin(np.pi / 5))
    ex, ey = notch[0] - tip[0], notch[1] - tip[1]
    length = float(np.hypot(ex, ey))
    distance: Floats = ((a - tip[0]) * ey - (b - tip[1]) * ex) / length
    return distance


def _ring(u: Floats, v: Floats) -> Floats:
    distance: Floats = np.abs(np.sqrt(u * u + v * v) - 0.70) - 0.24
    return distance


def _cross(u: Floats, v: Floats) -> Floats:
    au, av = np.abs(u), np.abs(v)
    distance: Floats = np.minimum(np.maximum(au - 0.92, av - 0.32), np.maximum(av - 0.92, au - 0.32))
    return distance


_FIELDS = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "ring": _ring, "cross": _cross}
