"""Settings and fixtures that every test shares.

The environment is prepared before jax is first imported: the number of host devices and the
plotting backend are read once, at import.
"""

import gc
import importlib.metadata
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

FLAGS = ["--xla_force_host_platform_device_count=8"]
# Compiling takes nearly all of the tests' time, and a fifth of it without these optimisations. XLA ends
# the process at a flag that it does not know, so each goes up to the newest jaxlib that is seen to have it.
# MTL_OPTAX_XLA=default leaves the optimisations on, as .ci/run does once for the numerics.
QUICK = {
    "--xla_backend_optimization_level=0": (0, 12),
    "--xla_cpu_parallel_codegen_split_count=1": (0, 12),
    "--xla_cpu_use_fusion_emitters=false": (0, 10),
}
jaxlib = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
if os.environ.get("MTL_OPTAX_XLA", "quick") != "default":
    FLAGS += [flag for flag, newest in QUICK.items() if (0, 8) <= jaxlib <= newest]
given = os.environ.get("XLA_FLAGS", "")
missing = [flag for flag in FLAGS if flag.split("=")[0] not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
os.environ.setdefault("MPLBACKEND", "Agg")
# What was compiled is kept for the next run, where `pytest --cache-clear` deletes it.
TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "d" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# ipykernel and jupyter_core look for the user's settings in the places that platformdirs names.
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

# A state without the task axis must never broadcast silently against gradients that have it.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64() -> Iterator[None]:
    """Run one test in double precision; the others keep jax's default."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float64", pytest.param("float32", marks=pytest.mark.slow)])
def dtype(request: pytest.FixtureRequest) -> Iterator[jax.numpy.dtype]:
    """Run one test in double precision, and as a slow one in single precision."""
    with jax.enable_x64(request.param == "float64"):
        yield jax.numpy.dtype(request.param)


@pytest.fixture
def strict_dtypes() -> Iterator[None]:
    """Refuse implicit dtype promotion in one test (optax.adam itself would fail under it)."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the checkout."""
    return ROOT


def pytest_collection_finish() -> None:
    """Look for garbage less often: nearly all of what JAX makes stays, and each search goes over it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)


# A compiled program is about 13 mappings of memory, of which Linux allows a process 65,530.
MAPPINGS, MOST_MAPPINGS = Path("/proc/self/maps"), 30_000
finished = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Drop the compiled programs where a worker has come to hold very many."""
    if next(finished) % 50 == 0 and MAPPINGS.exists():
        with MAPPINGS.open("rb") as mappings:
            if sum(1 for _ in mappings) > MOST_MAPPINGS:
                jax.clear_caches()


# The files that take longest, longest first: a worker that starts one of them last is waited for.
LONGEST = (
    "test_composition.py",
    "test_golden.py",
    "test_common.py",
    "test_sharding.py",
    "test_on_representation.py",
    "test_solvers.py",
    "test_absent_tasks.py",
    "test_fork_operator.py",
    "test_check.py",
    "test_identities.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file on one worker, and skip what needs an accelerator where there is none.

    Tests of one file share compiled functions. A test may name a finer group of its own.
    """
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(TESTS))))
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() == "cpu":
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU or a TPU"))
