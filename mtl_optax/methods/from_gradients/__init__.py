"""Methods that look at gradients element by element, or keep buffers of their size."""

from mtl_optax.method import Method

TABLE: tuple[Method, ...] = ()
