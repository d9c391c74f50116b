"""Methods that look at the losses only, or at nothing: one backward pass is enough."""

from mtl_optax.methods.from_losses import (
    bandit_mtl,
    cosmos,
    dwa,
    famo,
    gls,
    go4align,
    imtl_l,
    pbi,
    rlw,
    scale_invariant,
    stch,
    uncertainty,
)

TABLE = (
    bandit_mtl.METHOD,
    cosmos.METHOD,
    dwa.METHOD,
    famo.METHOD,
    gls.METHOD,
    go4align.METHOD,
    imtl_l.METHOD,
    pbi.METHOD,
    rlw.METHOD,
    scale_invariant.METHOD,
    stch.METHOD,
    uncertainty.METHOD,
)
