"""Fetch MovieLens-100K once into the user's cache, checked, atomically, from one of two sources.

The licence of MovieLens allows research use and no redistribution, so the ratings are never part of
this repository: they come from GroupLens itself or, where that address cannot be reached, out of a
wheel on the configured package index that carries the same file.
"""

import hashlib
import io
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import numpy as np

from examples.studies.harness.command import write_atomically
from examples.studies.harness.download import cache_folder, download_wheel
from examples.studies.harness.errors import UserError

GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
GROUPLENS_MEMBER = "ml-100k/u.data"
WHEEL = "recbole==1.2.1"
WHEEL_MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"
# SHA-256 of the canonical text (see `canonical_text`), so one number checks both sources.
CONTENT_SHA256 = "0fccc4b62e2f6aa246014ac7b8946c15ccb82269dc40eaae7d45d81a5fb44e1a"

CONNECT_SECONDS = 5.0
WHEEL_SECONDS = 60.0
MAX_BYTES = 32 * 2**20  # of an archive, and of the file in it
WAYS_OUT = "use --data synthetic, or --data PATH with a folder of behaviours"


def from_grouplens() -> bytes:
    """GroupLens's own archive."""
    with urllib.request.urlopen(GROUPLENS_URL, timeout=CONNECT_SECONDS) as response:
        return response.read(MAX_BYTES)


def from_package_index() -> bytes:
    """The wheel."""
    with tempfile.TemporaryDirectory() as folder:
        return download_wheel(WHEEL, Path(folder), WHEEL_SECONDS).read_bytes()


def canonical_text(archive: bytes, member: str) -> bytes:
    """The ratings as sorted CSV lines: the same bytes whichever archive they came from."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened, opened.open(member) as stream:
        content = io.BytesIO(stream.read(MAX_BYTES))
    # One of the two files has a header; one writes whole numbers as 3.0.
    ratings = np.loadtxt(content, delimiter="\t", comments="user_id", ndmin=2).astype(np.int64)
    ordered = ratings[np.lexsort(ratings.T[::-1])]
    return "".join(f"{u},{i},{r},{t}\n" for u, i, r, t in ordered.tolist()).encode("ascii")


def checked(text: bytes) -> bytes:
    """The canonical text, if its hash is the pinned one."""
    found = hashlib.sha256(text).hexdigest()
    if found != CONTENT_SHA256:
        raise ValueError(f"the content hash is {found[:12]}..., not {CONTENT_SHA256[:12]}...")
    return text


def movielens_ratings() -> np.ndarray:
    """Rows `user, item, rating, timestamp` of MovieLens-100K, from the cache or a first download."""
    cached = cache_folder() / "ml-100k.csv"
    try:
        text = checked(cached.read_bytes())
    except (OSError, ValueError):  # absent, or damaged: fetch it (again)
        text = _download()
        write_atomically(cached, text)
    return np.loadtxt(io.BytesIO(text), np.int64, delimiter=",")


def _download() -> bytes:
    sources = (
        ("files.grouplens.org", from_grouplens, GROUPLENS_MEMBER),
        (f"the package index ({WHEEL})", from_package_index, WHEEL_MEMBER),
    )
    reasons = []
    for name, fetch, member in sources:
        try:
            return checked(canonical_text(fetch(), member))
        except (UserError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            reasons.append(f"{name}: {error}")
    raise UserError(f"MovieLens-100K is not available: {'; '.join(reasons)}; {WAYS_OUT}")
