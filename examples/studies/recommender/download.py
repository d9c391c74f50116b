"""Fetch MovieLens-100K once into the user's cache, checked, atomically, from one of two sources.

The licence of MovieLens allows research use and no redistribution, so the ratings are never part of
this repository: they come from GroupLens itself or, where that address cannot be reached, out of a
wheel on the configured package index that carries the same file.
"""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from examples.studies.harness.command import write_atomically
from examples.studies.harness.errors import UserError

GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
GROUPLENS_MEMBER = "ml-100k/u.data"
WHEEL = "recbole==1.2.1"
WHEEL_MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"
# SHA-256 of the canonical text (see `canonical_text`), so one number checks both sources.
CONTENT_SHA256 = "0fccc4b62e2f6aa246014ac7b8946c15ccb82269dc40eaae7d45d81a5fb44e1a"

CONNECT_SECONDS = 5.0
DOWNLOAD_SECONDS = 60.0
MAX_ARCHIVE_BYTES = 32 * 2**20
MAX_MEMBER_BYTES = 16 * 2**20
WAYS_OUT = "use --data synthetic, or --data PATH with a folder of behaviours"


def cache_folder() -> Path:
    """`$MTL_OPTAX_CACHE`, else `mtl_optax` under `$XDG_CACHE_HOME` or `~/.cache`."""
    explicit = os.environ.get("MTL_OPTAX_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtl_optax"


def read_member(archive: bytes, member: str) -> bytes:
    """Read one member of a zip in memory, refusing an archive that is broken, huge or unsafe."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            for name in opened.namelist():
                path = PurePosixPath(name.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    raise UserError(f"the archive has a member outside its folder: {name!r}")
            with opened.open(member) as stream:
                content = stream.read(MAX_MEMBER_BYTES + 1)
    except KeyError:
        raise UserError(f"the archive has no member {member}") from None
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"the archive is corrupt ({error})") from None
    if len(content) > MAX_MEMBER_BYTES:
        raise UserError(f"{member} is larger than {MAX_MEMBER_BYTES} bytes")
    return content


def parse_ratings(content: bytes) -> np.ndarray:
    """Rows `user, item, rating, timestamp` of a tab-separated file, with or without a header."""
    try:
        lines = content.decode("ascii").splitlines()
        if lines and not lines[0][:1].isdigit():
            lines = lines[1:]
        rows = np.array([line.split("\t") for line in lines], dtype=np.float64)
    except ValueError:
        raise UserError("the ratings are not four tab-separated numbers a line") from None
    if rows.ndim != 2 or rows.shape[1] != 4 or not np.all(np.isfinite(rows)):
        raise UserError("the ratings are not four tab-separated numbers a line")
    return rows.astype(np.int64)


def canonical_text(ratings: np.ndarray) -> bytes:
    """The ratings as sorted CSV lines: the same bytes whichever source they came from."""
    ordered = ratings[np.lexsort(ratings.T[::-1])]
    return "".join(f"{u},{i},{r},{t}\n" for u, i, r, t in ordered.tolist()).encode("ascii")


def check_content(text: bytes) -> bytes:
    """Return the canonical text when its hash is the pinned one, else raise."""
    found = hashlib.sha256(text).hexdigest()
    if found != CONTENT_SHA256:
        raise UserError(f"the content hash is {found[:12]}..., not {CONTENT_SHA256[:12]}...")
    return text


def from_grouplens() -> bytes:
    """The canonical ratings from GroupLens's own zip."""
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    archive = bytearray()
    try:
        with urllib.request.urlopen(GROUPLENS_URL, timeout=CONNECT_SECONDS) as response:
            while chunk := response.read(2**16):
                archive += chunk
                if len(archive) > MAX_ARCHIVE_BYTES or time.monotonic() > deadline:
                    raise UserError("the download is too large or too slow")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be reached ({getattr(error, 'reason', error)})") from None
    return canonical_text(parse_ratings(read_member(bytes(archive), GROUPLENS_MEMBER)))


def from_package_index() -> bytes:
    """The canonical ratings out of a wheel that the configured package index serves."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--retries", "1"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [*command, "--dest", folder, WHEEL], capture_output=True, timeout=DOWNLOAD_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired):
            raise UserError("pip download did not finish") from None
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise UserError("pip download failed")
        if wheels[0].stat().st_size > MAX_ARCHIVE_BYTES:
            raise UserError("the wheel is too large")
        archive = wheels[0].read_bytes()
    return canonical_text(parse_ratings(read_member(archive, WHEEL_MEMBER)))


def movielens_ratings() -> np.ndarray:
    """Rows `user, item, rating, timestamp` of MovieLens-100K, from the cache or a first download."""
    cached = cache_folder() / "ml-100k.csv"
    try:
        text = check_content(cached.read_bytes())
    except (OSError, UserError):  # absent, or damaged: fetch it (again)
        text = _download()
        try:
            write_atomically(cached, text)
        except OSError as error:
            raise UserError(
                f"cannot write {cached} ({error.strerror}); set MTL_OPTAX_CACHE"
            ) from None
    return parse_ratings(text.replace(b",", b"\t"))


def _download() -> bytes:
    sources: tuple[tuple[str, Callable[[], bytes]], ...] = (
        ("files.grouplens.org", from_grouplens),
        (f"the package index ({WHEEL})", from_package_index),
    )
    reasons = []
    for name, fetch in sources:
        try:
            return check_content(fetch())
        except UserError as error:
            reasons.append(f"{name}: {error}")
    raise UserError(f"MovieLens-100K is not available: {'; '.join(reasons)}; {WAYS_OUT}")
