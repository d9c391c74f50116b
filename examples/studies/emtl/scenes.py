"""Rendered rooms with exact segmentation, depth and surface normals: SYNTHETIC SCENES.

A room with windows, boxes, balls and cylinders is seen by a pinhole camera. Each pixel is one ray, and
what it hits first gives the class, the depth and the normal without error. The image has textures, the
light of one lamp, and noise.

Coordinates of the camera: x to the right, y downwards, z forwards. Depth is z, not the length of the ray.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

CLASSES = ("floor", "ceiling", "wall", "window", "box", "ball", "cylinder")
FLOOR, CEILING, WALL, WINDOW, BOX, BALL, CYLINDER = range(len(CLASSES))
FOCAL = 0.8  # of the camera, in widths of the image: 64 degrees from left to right
SIDES = ((0, -1), (0, 1), (2, 1))  # of a room that have windows: the axis and the direction


class Scenes(NamedTuple):
    """Images and their labels.

    Attributes:
      images: float32 `[N, H, W, 3]`, colours from 0 to 1.
      labels: int32 `[N, H, W]`, classes, -1 where unlabelled.
      depths: float32 `[N, H, W, 1]`, 0 where unknown.
      normals: float32 `[N, H, W, 3]` of length 1, zeros where unknown.
    """

    images: np.ndarray
    labels: np.ndarray
    depths: np.ndarray
    normals: np.ndarray


KINDS = Scenes(np.float32, np.int32, np.float32, np.float32)  # of the numbers


class Hits(NamedTuple):
    """What rays `[P, 3]` hit.

    Attributes:
      distance: `[P]` in multiples of the ray's direction; infinite for a miss.
      normals: `[P, 3]` in the world, towards the viewer.
      kinds: `[P]`, classes.
      places: `[P, 2]`, coordinates on the surface, for its texture.
    """

    distance: np.ndarray
    normals: np.ndarray
    kinds: np.ndarray
    places: np.ndarray


class Ball(NamedTuple):
    """A ball."""

    center: np.ndarray
    radius: float

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> Hits:
        """The nearer of the two points on each ray."""
        offset = origin - self.center
        constant = offset @ offset - self.radius**2
        distance = _smaller_root(np.sum(rays**2, axis=1), rays @ offset, constant)
        normals = (origin + rays * distance[:, None] - self.center) / self.radius
        kinds = np.full(len(rays), BALL)
        return Hits(distance, normals, kinds, self.radius * normals[:, :2])


class Box(NamedTuple):
    """A box that stands on a horizontal plane, turned around the vertical by `angle`."""

    center: np.ndarray
    half: np.ndarray
    angle: float

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> Hits:
        """Where each ray enters: the last of the three pairs of planes that it enters."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        start, along = (origin - self.center) @ turn, rays @ turn
        first, last = _slabs(start, along, self.half)
        axis = np.argmax(first, axis=1)
        enter = first.max(axis=1)
        distance = np.where((enter < last.min(axis=1)) & (enter > 0), enter, np.inf)
        normals, places = _faces(start, along, distance, axis)
        return Hits(distance, normals @ turn.T, np.full(len(rays), BOX), places)


class Cylinder(NamedTuple):
    """An upright cylinder with a lid, from `bottom` to `top`; the bottom stands on something."""

    center: np.ndarray  # [2]: x and z
    radius: float
    bottom: float
    top: float

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> Hits:
        """The side or the lid, whichever comes first."""
        flat, offset = rays[:, [0, 2]], origin[[0, 2]] - self.center
        constant = offset @ offset - self.radius**2
        side = _smaller_root(np.sum(flat**2, axis=1), flat @ offset, constant)
        height = (origin + rays * side[:, None])[:, 1]
        side = np.where((height > self.bottom) & (height < self.top), side, np.inf)
        lid = (self.top - origin[1]) / rays[:, 1]
        spot = (origin + rays * lid[:, None])[:, [0, 2]] - self.center
        lid = np.where((lid > 0) & (np.sum(spot**2, axis=1) < self.radius**2), lid, np.inf)
        distance = np.minimum(side, lid)
        points = origin + rays * distance[:, None]
        x, z = (points[:, [0, 2]] - self.center).T / self.radius
        normals = np.where((side < lid)[:, None], np.stack([x, 0 * x, z], axis=1), [0.0, 1.0, 0.0])
        places = np.stack([self.radius * np.arctan2(x, z), points[:, 1]], axis=1)
        return Hits(distance, normals, np.full(len(rays), CYLINDER), places)


class Room(NamedTuple):
    """The inside of a box from `-half` to `half` in x and z and from 0 to `2 half` in y, with windows.

    Attributes:
      half: half its sizes.
      windows: rectangles: one of `SIDES`, and the center and half the sizes on it.
    """

    half: np.ndarray
    windows: tuple[Any, ...]

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> Hits:
        """Where each ray leaves the box: the first of the three pairs of planes that it leaves."""
        start = origin - np.array([0.0, self.half[1], 0.0])
        last = _slabs(start, rays, self.half)[1]
        axis = np.argmin(last, axis=1)
        distance = last.min(axis=1)
        normals, places = _faces(start, rays, distance, axis)
        vertical = normals[:, 1]
        kinds = np.select([vertical > 0.5, vertical < -0.5], [FLOOR, CEILING], WALL)
        points = start + rays * distance[:, None]
        for (wall, direction), center, half in self.windows:
            inside = (axis == wall) & (np.sign(points[:, wall]) == direction)
            off = np.abs(points[:, [2 - wall, 1]] - center)
            kinds = np.where(inside & np.all(off < half, axis=1), WINDOW, kinds)
        return Hits(distance, normals, kinds, places)


class Scene(NamedTuple):
    """A room with things in it, a camera and a lamp.

    Attributes:
      things: the room first.
      camera: where the camera is.
      pose: `[3, 3]`: the camera's x, y and z as columns in the world, where y is upwards.
      lamp: where the lamp is.
    """

    things: Sequence[Room | Ball | Box | Cylinder]
    camera: np.ndarray
    pose: np.ndarray
    lamp: np.ndarray


def directions(height: int, width: int) -> np.ndarray:
    """The rays `[H * W, 3]` of the pixels in coordinates of the camera, with z = 1."""
    x = (np.arange(width) + 0.5 - width / 2) / (FOCAL * width)
    y = (np.arange(height) + 0.5 - height / 2) / (FOCAL * width)
    grid = np.stack(np.broadcast_arrays(x[None], y[:, None], 1.0), axis=-1)
    return grid.reshape(height * width, 3)


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random room."""
    half = np.array([rng.uniform(1.6, 2.6), rng.uniform(1.2, 1.5), rng.uniform(2.0, 3.2)])
    windows = tuple(_draw_window(rng, half) for _ in range(rng.integers(1, 4)))
    things: list[Room | Ball | Box | Cylinder] = [Room(half, windows)]
    for _ in range(rng.integers(3, 8)):
        things += _draw_thing(rng, half)
    camera = np.array([rng.uniform(-0.5, 0.5), rng.uniform(1.1, 1.8), -half[2] + 0.2])
    yaw, pitch = rng.uniform(-0.35, 0.35), rng.uniform(-0.1, 0.3)
    forward = np.array([np.sin(yaw) * np.cos(pitch), -np.sin(pitch), np.cos(yaw) * np.cos(pitch)])
    right = np.array([np.cos(yaw), 0.0, -np.sin(yaw)])
    pose = np.stack([right, np.cross(right, forward), forward], axis=1)
    lamp = np.array([rng.uniform(-1, 1), 2 * half[1] - 0.2, rng.uniform(-1, 1)])
    return Scene(things, camera, pose, lamp)


# A ray that misses meets a thing at infinity, or nowhere.
@np.errstate(divide="ignore", invalid="ignore")
def trace(scene: Scene, height: int, width: int) -> tuple[np.ndarray, Hits]:
    """Which thing each ray hits first, `[P]`, and where; `distance` is the depth."""
    rays = directions(height, width) @ scene.pose.T
    found = [thing.hit(scene.camera, rays) for thing in scene.things]
    nearest = np.argmin([hits.distance for hits in found], axis=0)
    pixels = np.arange(len(rays))
    parts = (np.stack(part)[nearest, pixels] for part in zip(*found, strict=True))
    return nearest, Hits(*parts)


def render(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Scenes:
    """The image `[H, W, 3]`, classes `[H, W]`, depths `[H, W, 1]` and the camera's normals `[H, W, 3]`."""
    nearest, hits = trace(scene, height, width)
    rays = directions(height, width) @ scene.pose.T
    to_lamp = scene.lamp - (scene.camera + rays * hits.distance[:, None])
    far = np.linalg.norm(to_lamp, axis=1)
    light = np.maximum(np.sum(hits.normals * to_lamp, axis=1) / far, 0) / (1 + 0.15 * far**2)
    image = _colours(nearest, hits, rng) * (0.45 + 1.2 * light)[:, None]
    image = image + 0.03 * rng.standard_normal(image.shape)
    parts = np.clip(image, 0, 1), hits.kinds, hits.distance[:, None], hits.normals @ scene.pose
    return Scenes(*(part.reshape(height, width, *part.shape[1:]) for part in parts))


def synthetic_scenes(number: int, height: int, width: int, seed: int) -> Scenes:
    """Rendered scenes; the same for the same arguments."""
    seeds = np.random.SeedSequence([seed, height, width]).spawn(number)
    rngs = map(np.random.default_rng, seeds)
    found = [render(draw_scene(rng), height, width, rng) for rng in rngs]
    columns = zip(zip(*found, strict=True), KINDS, strict=True)
    return Scenes(*(np.stack(column).astype(kind) for column, kind in columns))


def _draw_window(rng: np.random.Generator, half: np.ndarray) -> Any:
    side = SIDES[rng.integers(3)]
    size = rng.uniform(0.3, 0.8), rng.uniform(0.3, 0.6)
    room = half[2 - side[0]] - size[0]
    return (side, (rng.uniform(-room, room), rng.uniform(0.0, 0.4)), size)


def _draw_thing(rng: np.random.Generator, half: np.ndarray) -> Sequence[Ball | Box | Cylinder]:
    """A ball, a cylinder, or a box with or without a ball on it, in the further part of the room."""
    x, z = rng.uniform(-half[0] + 0.4, half[0] - 0.4), rng.uniform(-half[2] + 1.6, half[2] - 0.4)
    kind = rng.integers(4)
    if kind == 0:
        radius = rng.uniform(0.2, 0.45)
        return [Ball(np.array([x, radius, z]), radius)]
    if kind == 1:
        return [Cylinder(np.array([x, z]), rng.uniform(0.12, 0.3), 0.0, rng.uniform(0.5, 1.6))]
    size = np.array([rng.uniform(0.2, 0.6), rng.uniform(0.15, 0.5), rng.uniform(0.2, 0.6)])
    box = Box(np.array([x, size[1], z]), size, rng.uniform(0, np.pi))
    if kind == 2:
        return [box]
    radius = rng.uniform(0.1, 0.2)
    return [box, Ball(np.array([x, 2 * size[1] + radius, z]), radius)]


def _colours(nearest: np.ndarray, hits: Hits, rng: np.random.Generator) -> np.ndarray:
    """The colour `[P, 3]` of each surface without light: two colours in the pattern of its class."""
    colours = np.zeros((len(nearest), 3))
    for thing in np.unique(nearest):
        for kind in np.unique(hits.kinds[nearest == thing]):
            here = (nearest == thing) & (hits.kinds == kind)
            one, other = _palette(kind, rng)
            columns, rows = np.floor(hits.places[here].T / rng.uniform(0.15, 0.4))
            checks = columns + rows
            pattern = {FLOOR: checks, WALL: columns, BOX: rows, CYLINDER: checks}
            mix = pattern.get(kind, 0 * rows)[:, None] % 2
            colours[here] = one * (1 - mix) + other * mix
    return colours


def _palette(kind: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    base = rng.uniform(0.2, 0.9, size=3)
    if kind == CEILING:
        base = rng.uniform(0.7, 0.95) * np.ones(3)
    if kind == WINDOW:
        base = np.array([0.6, 0.8, 1.0]) * rng.uniform(0.8, 1.2)
    if kind == WALL:
        return base, np.clip(base + rng.uniform(-0.1, 0.1), 0, 1)
    return base, np.clip(base * rng.uniform(0.4, 0.9, size=3), 0, 1)


def _smaller_root(a: np.ndarray, b: np.ndarray, c: float) -> np.ndarray:
    """The smaller root of a t^2 + 2 b t + c, infinite where there is none or it lies behind."""
    square = b**2 - a * c
    root = (-b - np.sqrt(square)) / a
    return np.where((square > 0) & (root > 0), root, np.inf)


def _slabs(start: np.ndarray, along: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays enter and leave the three pairs of planes of a box around 0, `[P, 3]` each."""
    ends = (-half - start) / along, (half - start) / along
    return np.minimum(*ends), np.maximum(*ends)


def _faces(
    start: np.ndarray, along: np.ndarray, distance: np.ndarray, axis: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The normals of the faces of a box at right angles to `axis`, and two coordinates on them."""
    # Seen from outside or from inside, the side that one sees has its normal against the ray.
    normals = np.where(np.arange(3) == axis[:, None], -np.sign(along), 0.0)
    # Of the two coordinates on a face the vertical one comes last.
    others = np.array([[2, 1], [0, 2], [0, 1]])[axis]
    return normals, np.take_along_axis(start + along * distance[:, None], others, axis=1)
