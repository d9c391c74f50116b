"""Reads NYUv2 as the field prepares it, and as the programs of MTAN and LibMTL read it.

    FOLDER/train/{image,label,depth,normal}/0.npy, 1.npy, ...      795 images in the published archive
    FOLDER/val/{image,label,depth,normal}/0.npy, 1.npy, ...        654

One array an image, with the channels last: image `[288, 384, 3]`, label `[288, 384]` with 13 classes and -1
where unlabelled, depth `[288, 384, 1]` and normal `[288, 384, 3]`. The archive is linked from the authors'
page, https://github.com/lorenmt/mtan; it is not ours to hand out.
"""

from pathlib import Path

import numpy as np

from examples.studies.emtl.scenes import Scenes
from examples.studies.harness.errors import UserError

NUM_CLASSES = 13
PARTS = ("image", "label", "depth", "normal")
KINDS = (np.float32, np.int32, np.float32, np.float32)


def read_nyuv2(folder: Path) -> tuple[Scenes, Scenes]:
    """The scenes to train on and those to measure on."""
    return _read_split(folder / "train"), _read_split(folder / "val")


def _read_split(folder: Path) -> Scenes:
    numbers = sorted(int(p.stem) for p in (folder / "image").glob("*.npy") if p.stem.isdigit())
    if not numbers:
        raise UserError(
            f"{folder / 'image'}: no 0.npy, 1.npy, ...; see examples/studies/emtl/scenes_nyuv2.py"
        )
    columns = []
    for part, kind in zip(PARTS, KINDS, strict=True):
        arrays = [_load(folder / part / f"{number}.npy").astype(kind) for number in numbers]
        if len({array.shape for array in arrays}) > 1:
            raise UserError(f"{folder / part}: arrays of different shapes")
        columns.append(np.stack(arrays))
    scenes = Scenes(*columns)
    _check(scenes, folder)
    return scenes


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def _check(scenes: Scenes, folder: Path) -> None:
    height, width = scenes.labels.shape[1:3]
    number = len(scenes.images)
    expected = [(height, width, channels) for channels in (3, 1, 3)]
    found = [part.shape[1:] for part in (scenes.images, scenes.depths, scenes.normals)]
    if found != expected or scenes.labels.shape != (number, height, width):
        raise UserError(
            f"{folder}: image, depth and normal must be (height, width, channels) with the label's height "
            f"and width, {expected}; found {found}"
        )
    if scenes.labels.min() < -1 or scenes.labels.max() >= NUM_CLASSES:
        raise UserError(
            f"{folder}: labels must be -1 to {NUM_CLASSES - 1}; found {scenes.labels.min()} to "
            f"{scenes.labels.max()}"
        )
