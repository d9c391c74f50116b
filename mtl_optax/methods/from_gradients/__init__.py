"""Methods that look at gradients element by element, or keep buffers of their size."""

from mtl_optax.methods.from_gradients import (
    adatask,
    db_mtl,
    excess_mtl,
    graddrop,
    moco,
    mtadam,
    trimmed_mean,
)

TABLE = (
    adatask.METHOD,
    db_mtl.METHOD,
    excess_mtl.METHOD,
    graddrop.METHOD,
    moco.METHOD,
    mtadam.METHOD,
    trimmed_mean.METHOD,
)
