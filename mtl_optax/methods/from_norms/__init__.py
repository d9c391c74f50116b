"""Methods that look at the norms of the task gradients."""

from mtl_optax.methods.from_norms import gradnorm, metabalance, rotograd_scale

TABLE = (gradnorm.METHOD, metabalance.METHOD, rotograd_scale.METHOD)
