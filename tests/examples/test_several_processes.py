"""Two real processes over the loopback address find what one process finds."""

import socket

import jax
import numpy as np
import pytest

from examples.several_processes import TASKS, launch, train

pytestmark = pytest.mark.slow


def require_loopback():
    """Skips where a sandbox allows no listening socket on the loopback address."""
    try:
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            client.settimeout(5)
            client.connect(server.getsockname())
    except OSError as error:
        pytest.skip(f"no loopback connection: {error}")


def test_two_processes_equal_one(monkeypatch, root):
    require_loopback()
    monkeypatch.chdir(root)
    # One device per process, whatever this test session simulates.
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    first, second = launch(steps=5)
    assert first == second
    assert jax.process_count() == 1
    for name, found in first.items():
        alone = train(name, steps=5)
        np.testing.assert_allclose(found["weights"], alone["weights"], rtol=1e-4)
        for task in TASKS:
            np.testing.assert_allclose(found["losses"][task], alone["losses"][task], rtol=1e-4)


def test_a_process_that_fails_is_reported(monkeypatch, root, capfd):
    require_loopback()
    monkeypatch.chdir(root)
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    with pytest.raises(RuntimeError, match="failed: process 0, 1; see above"):
        launch(steps=1, timeout=60)
    assert "no_such_platform" in capfd.readouterr().err
