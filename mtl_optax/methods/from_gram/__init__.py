"""Methods that look at the inner products of the task gradients: a `[T, T]` problem."""

from mtl_optax.methods.from_gram import emtl, mgda, multibalance

TABLE = (emtl.METHOD, mgda.METHOD, multibalance.METHOD)
