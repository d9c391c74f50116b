"""Reads NYUv2 as the field prepares it, and as the programs of MTAN and LibMTL read it.

    FOLDER/train/{image,label,depth,normal}/0.npy, 1.npy, ...      795 images in the published archive
    FOLDER/val/{image,label,depth,normal}/0.npy, 1.npy, ...        654

One array an image, with the channels last: image `[288, 384, 3]`, label `[288, 384]` with 13 classes and -1
where unlabelled, depth `[288, 384, 1]` and normal `[288, 384, 3]`. The archive is linked from the authors'
page, https://github.com/lorenmt/mtan; it is not ours to hand out.
"""

from pathlib import Path

import numpy as np

from examples.studies.emtl.scenes import KINDS, Scenes
from examples.studies.harness.errors import UserError

NUM_CLASSES = 13
PARTS = ("image", "label", "depth", "normal")


def read_nyuv2(folder: Path) -> tuple[Scenes, Scenes]:
    """The scenes to train on and those to measure on."""
    return _read_split(folder / "train"), _read_split(folder / "val")


def _read_split(folder: Path) -> Scenes:
    numbers = sorted(int(p.stem) for p in (folder / "image").glob("*.npy") if p.stem.isdigit())
    if not numbers:
        raise UserError(
            f"{folder / 'image'}: no 0.npy, 1.npy, ...; see examples/studies/emtl/scenes_nyuv2.py"
        )
    try:
        scenes = Scenes(*(
            np.stack([np.load(folder / part / f"{n}.npy").astype(kind) for n in numbers])
            for part, kind in zip(PARTS, KINDS, strict=True)
        ))  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {error}") from None
    shape, found = scenes.labels.shape, [part.shape for part in scenes]
    if len(shape) != 3 or found != [(*shape, 3), shape, (*shape, 1), (*shape, 3)]:
        raise UserError(
            f"{folder}: {', '.join(PARTS)} must have one height and width and the channels last; "
            f"found {found}"
        )
    if scenes.labels.min() < -1 or scenes.labels.max() >= NUM_CLASSES:
        raise UserError(f"{folder}: labels must be -1 to {NUM_CLASSES - 1}")
    return scenes
