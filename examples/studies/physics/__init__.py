"""Physics-informed networks: which balancing of residual and boundary losses helps, and which does not."""
