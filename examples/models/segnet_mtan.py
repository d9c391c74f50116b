"""A small SegNet with MTAN's attention, for segmentation, depth and surface normals of images.

Liu, Johns, Davison, End-to-End Multi-Task Learning with Attention, CVPR 2019, on the encoder and decoder of
Badrinarayanan et al., SegNet, 2017.

    represent: images [batch, H, W, 3] -> encoder, decoder -> two feature maps at each of their levels
    head(t):   attention of task t selects from the maps -> output t [batch, H, W, channels of t]

Level i has `widths[i]` channels and is 2^i times smaller than the image; H and W are multiples of
2^len(widths). The decoder puts values back where the encoder's pooling took them from, as SegNet does.

What differs from the authors' program: three levels with few channels in place of five; group
normalisation in place of batch normalisation, so that a step needs no running statistics; and the
3x3 convolutions between two attention masks belong to each task, where the authors share them, so that
the heads hold parameters of the tasks alone.

Parameters with 7 classes and the defaults: 112,051.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

KERNEL_INIT = nnx.initializers.he_uniform()
TASKS = ("segmentation", "depth", "normals")


class Maps(NamedTuple):
    """Two feature maps of one level: what an attention mask looks at, and what it is applied to."""

    seen: jax.Array
    masked: jax.Array


class Representation(NamedTuple):
    """The maps of the encoder, from the image downwards, and of the decoder, back up to the image."""

    encoder: tuple[Maps, ...]
    decoder: tuple[Maps, ...]


class Predictions(NamedTuple):
    """Logits `[batch, H, W, classes]`, depths `[batch, H, W, 1]` and unit normals `[batch, H, W, 3]`."""

    segmentation: jax.Array
    depth: jax.Array
    normals: jax.Array


def convolution(
    fan_in: int, fan_out: int, size: int, rngs: nnx.Rngs, bias: bool = False
) -> nnx.Conv:
    """A convolution that keeps height and width.

    On an accelerator it is a matrix product. `vmap` over networks makes one larger product of these; of
    convolutions with kernels of their own it makes a grouped one, which is many times slower.
    """
    how = {} if jax.default_backend() == "cpu" else {"conv_general_dilated": as_product}
    return nnx.Conv(
        fan_in, fan_out, (size, size), use_bias=bias, kernel_init=KERNEL_INIT, rngs=rngs, **how
    )


def as_product(maps: jax.Array, kernel: jax.Array, *_: object, **__: object) -> jax.Array:
    """What `jax.lax.conv_general_dilated` makes of a kernel `[size, size, in, out]` with odd size."""
    size, (_, height, width, _) = len(kernel), maps.shape
    edge = (size // 2, size // 2)
    padded = jnp.pad(maps, ((0, 0), edge, edge, (0, 0)))
    places = [(row, column) for row in range(size) for column in range(size)]
    shifted = [padded[:, i : i + height, j : j + width] for i, j in places]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


class Block(nnx.Module):
    """A convolution, group normalisation and an activation."""

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        size: int,
        rngs: nnx.Rngs,
        activation: Callable[[jax.Array], jax.Array] = nnx.relu,
    ):
        self.convolution = convolution(fan_in, fan_out, size, rngs)
        self.norm = nnx.GroupNorm(fan_out, num_groups=max(1, fan_out // 8), rngs=rngs)
        self.activation = activation

    def __call__(self, maps: jax.Array) -> jax.Array:
        return self.activation(self.norm(self.convolution(maps)))


class Attention(nnx.Module):
    """A mask between 0 and 1 from two layers of 1x1 convolutions."""

    def __init__(self, fan_in: int, fan_out: int, rngs: nnx.Rngs):
        self.first = Block(fan_in, fan_out, 1, rngs)
        self.second = Block(fan_out, fan_out, 1, rngs, activation=nnx.sigmoid)

    def __call__(self, *maps: jax.Array) -> jax.Array:
        return self.second(self.first(jnp.concatenate(maps, axis=-1)))


class Output(nnx.Module):
    """Two convolutions to the channels of a task."""

    def __init__(self, fan_in: int, channels: int, rngs: nnx.Rngs):
        self.first = convolution(fan_in, fan_in, 3, rngs, bias=True)
        self.second = convolution(fan_in, channels, 1, rngs, bias=True)

    def __call__(self, maps: jax.Array) -> jax.Array:
        return self.second(self.first(maps))


class SegNet(nnx.Module):
    """Encoder and decoder: images `[batch, H, W, 3]` to the `Representation`."""

    def __init__(self, widths: tuple[int, ...], rngs: nnx.Rngs):
        inputs = (3, *widths[:-1])  # of each level of the encoder
        outputs = (widths[0], *widths[:-1])  # of each level of the decoder
        self.encoder = nnx.List(
            nnx.List([Block(a, b, 3, rngs), Block(b, b, 3, rngs)])
            for a, b in zip(inputs, widths, strict=True)
        )
        self.decoder = nnx.List(
            nnx.List([Block(b, a, 3, rngs), Block(a, a, 3, rngs)])
            for a, b in zip(outputs, widths, strict=True)
        )

    def __call__(self, images: jax.Array) -> Representation:
        down, up, places = [], [], []
        maps = images
        for first, second in self.encoder:
            before = first(maps)
            after = second(before)
            down.append(Maps(before, after))
            maps, place = pool(after)
            places.append(place)
        for (first, second), place in zip(
            reversed(list(self.decoder)), reversed(places), strict=True
        ):
            spread = unpool(maps, place)
            maps = second(first(spread))
            up.append(Maps(spread, maps))
        return Representation(tuple(down), tuple(up))


class Branch(nnx.Module):
    """The attention of one task over all levels, and its output."""

    def __init__(self, widths: tuple[int, ...], channels: int, rngs: nnx.Rngs):
        below = (*widths[1:], widths[-1])  # the width of the encoder's next level
        above = (widths[0], *widths[:-1])  # the width of the decoder's next level
        self.encoder_masks = nnx.List(
            Attention(width if level == 0 else 2 * width, width, rngs)
            for level, width in enumerate(widths)
        )
        self.encoder_blocks = nnx.List(
            Block(width, after, 3, rngs) for width, after in zip(widths, below, strict=True)
        )
        self.decoder_blocks = nnx.List(
            Block(width, after, 3, rngs) for width, after in zip(widths, above, strict=True)
        )
        self.decoder_masks = nnx.List(
            Attention(width + after, after, rngs)
            for width, after in zip(widths, above, strict=True)
        )
        self.output = Output(widths[0], channels, rngs)

    def __call__(self, representation: Representation) -> jax.Array:
        carried: tuple[jax.Array, ...] = ()
        for maps, mask, block in zip(
            representation.encoder, self.encoder_masks, self.encoder_blocks, strict=True
        ):
            selected = mask(maps.seen, *carried) * maps.masked
            carried = (pool(block(selected))[0],)
        (selected,) = carried
        levels = zip(
            representation.decoder,
            reversed(list(self.decoder_masks)),
            reversed(list(self.decoder_blocks)),
            strict=True,
        )
        for maps, mask, block in levels:
            selected = mask(maps.seen, block(enlarge(selected))) * maps.masked
        return self.output(selected)


class SegNetMTAN(nnx.Module):
    """Predictions of the three tasks from images.

    Args:
      classes: of the segmentation.
      widths: the channels of each level, multiples of 8 or less than 16.
      rngs: for the first values of the parameters.
    """

    def __init__(self, classes: int, *, widths: tuple[int, ...] = (8, 16, 32), rngs: nnx.Rngs):
        self.segnet = SegNet(widths, rngs)
        self.towers = nnx.List(Branch(widths, channels, rngs) for channels in (classes, 1, 3))

    def represent(self, images: jax.Array) -> Representation:
        """The shared feature maps: the place for `mtl.fork`."""
        return self.segnet(images)

    def head(self, task: int, representation: Representation) -> jax.Array:
        """The prediction of one of `TASKS`."""
        return as_prediction(task, self.towers[task](representation))

    def heads(self, representation: Representation) -> Predictions:
        """The predictions of all tasks."""
        return Predictions(*(self.head(t, representation) for t in range(len(TASKS))))

    def __call__(self, images: jax.Array) -> Predictions:
        """The predictions of all tasks."""
        return self.heads(self.represent(images))


class SegNetSingle(nnx.Module):
    """A SegNet of its own for one of `TASKS`, without attention: the baseline of MTAN's table.

    Args:
      task: its number.
      classes: of the segmentation.
      widths: the channels of each level.
      rngs: for the first values of the parameters.
    """

    def __init__(
        self, task: int, classes: int, *, widths: tuple[int, ...] = (8, 16, 32), rngs: nnx.Rngs
    ):
        self.task = task
        self.segnet = SegNet(widths, rngs)
        self.output = Output(widths[0], (classes, 1, 3)[task], rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The prediction of the task."""
        return as_prediction(self.task, self.output(self.segnet(images).decoder[-1].masked))


def as_prediction(task: int, output: jax.Array) -> jax.Array:
    """Normals of length 1; logits and depths as they are."""
    if TASKS[task] != "normals":
        return output
    square = jnp.sum(output * output, axis=-1, keepdims=True)
    # An output of exactly 0 stays 0; with a smaller bound its gradient would overflow, 0 times infinity.
    return output * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def pool(maps: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The largest value of each 2x2 window, and four masks: where in the window it first stands."""
    corners = [maps[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    largest = jnp.maximum(jnp.maximum(*corners[:2]), jnp.maximum(*corners[2:]))
    free = jnp.ones(largest.shape, bool)
    places = []
    for corner in corners:
        places.append(free & (corner == largest))
        free = free & ~places[-1]
    return largest, tuple(places)


def unpool(maps: jax.Array, places: tuple[jax.Array, ...]) -> jax.Array:
    """Each value at its place in a 2x2 window of zeros."""
    corners = [jnp.where(place, maps, 0) for place in places]
    rows = [jnp.stack(corners[k : k + 2], axis=3) for k in (0, 2)]
    batch, height, width, channels = maps.shape
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)


def enlarge(maps: jax.Array) -> jax.Array:
    """Twice the height and width, bilinear."""
    batch, height, width, channels = maps.shape
    return jax.image.resize(maps, (batch, 2 * height, 2 * width, channels), "bilinear")
