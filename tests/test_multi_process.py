"""Two real processes over the loopback address find what one process finds."""

import dataclasses
import socket

import jax
import numpy as np
import pytest

from examples.multi_process import Config, launch, main, train

pytestmark = pytest.mark.slow
CONFIG = Config(steps=5)


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
    first, second = launch(CONFIG)
    assert first == second
    assert first["processes"] == 2
    alone = train(CONFIG)
    assert alone["processes"] == jax.process_count() == 1
    np.testing.assert_allclose(first["weights"], alone["weights"], rtol=1e-5)
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-5)
    assert sum(first["losses"][-1]) < sum(first["losses"][0])


def test_a_process_that_fails_is_reported(monkeypatch, root):
    require_loopback()
    monkeypatch.chdir(root)
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    with pytest.raises(RuntimeError, match=r"process 0 failed:[\s\S]*no_such_platform"):
        launch(dataclasses.replace(CONFIG, timeout=60))


def test_a_single_process_prints_what_it_found(capsys, monkeypatch):
    monkeypatch.setattr(
        "examples.multi_process.launch",
        lambda config: [{"weights": [0.5, 0.5], "losses": [[1, 1], [0.5, 0.5]]}] * 2,
    )
    main(["--steps", "2"])
    assert capsys.readouterr().out.count("weights [0.500000, 0.500000]") == 2
