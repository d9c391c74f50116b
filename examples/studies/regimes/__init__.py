"""When does balancing pay for a target with auxiliaries? Regimes of losses on one item-item network."""
