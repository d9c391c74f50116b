"""Methods that look at the norms of the task gradients."""

from mtl_optax.methods.from_norms import metabalance

TABLE = (metabalance.METHOD,)
