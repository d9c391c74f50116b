"""Methods that look at the losses only, or at nothing: one backward pass is enough."""

from mtl_optax.method import Method

TABLE: tuple[Method, ...] = ()
