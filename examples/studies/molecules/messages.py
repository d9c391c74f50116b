"""A network that passes messages between the atoms of a molecule, in place of histograms of distances.

As in SchNet (Schütt et al., 2017), an atom's message is the sum over all other atoms of their features
times a filter, a function of the distance. Here a filter is linear in the Gaussians of the distance, the
same as those of the histograms. Nothing but distances is read, so a molecule may be turned and moved, and
sums over atoms do not depend on their order.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.studies.molecules.arms import WIDTH, Shared
from examples.studies.molecules.data import ELEMENTS

CENTRES = np.linspace(0.8, 7.0, 20)  # of the Gaussians, in angstrom
SPACING = CENTRES[1] - CENTRES[0]
TYPICAL = 18  # atoms of a molecule, about the mean
FEATURES = WIDTH // 2
LAYERS = 2


class Interaction(nnx.Module):
    """Adds to every atom what it reads of the others."""

    def __init__(self, rngs: nnx.Rngs):
        self.sent = nnx.Linear(FEATURES, FEATURES, use_bias=False, rngs=rngs)
        filters = nnx.initializers.lecun_normal()
        self.filters = nnx.Param(filters(rngs.params(), (len(CENTRES), FEATURES)))
        self.hidden = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.out = nnx.Linear(FEATURES, FEATURES, rngs=rngs)

    def __call__(self, atoms: jax.Array, pairs: jax.Array) -> jax.Array:
        """Features `[A, F]`, from those before and the Gaussians of all pairs `[A, A, G]`."""
        # The sum over atoms comes first: an array [A, A, F] would take twice the time.
        found = jnp.einsum("ijg,jf->igf", pairs, self.sent(atoms))
        messages = jnp.einsum("igf,gf->if", found, self.filters[...])
        return atoms + self.out(nnx.silu(self.hidden(messages)))


class Encoder(nnx.Module):
    """The representation of a molecule: the sum and the mean over its atoms of a vector for each.

    The sum is what extensive properties grow with, the mean is for the others.
    """

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(
            1 + len(ELEMENTS),
            FEATURES,
            embedding_init=nnx.initializers.normal(1.0),
            rngs=rngs,
        )
        self.interactions = nnx.List([Interaction(rngs) for _ in range(LAYERS)])
        self.hidden = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.out = nnx.Linear(FEATURES, FEATURES, rngs=rngs)

    def __call__(self, molecule: jax.Array) -> jax.Array:
        """The representation `[2 F]` of a molecule `[A, 4]`, as `padded` has it."""
        elements, positions = molecule[:, 0].astype(int), molecule[:, 1:]
        there = elements > 0
        distances = jnp.linalg.norm(positions[:, None] - positions[None], axis=-1)
        pairs = there[:, None] & there[None] & ~jnp.eye(len(molecule), dtype=bool)
        gaussians = jnp.exp(-0.5 * ((distances[..., None] - CENTRES[None, None]) / SPACING) ** 2)
        gaussians *= pairs[..., None]
        atoms = self.embedding(elements)
        for interaction in self.interactions:
            atoms = interaction(atoms, gaussians)
        each = self.out(nnx.silu(self.hidden(atoms))) * there[:, None]
        total = each.sum(axis=0)
        return jnp.concatenate([total / TYPICAL, total / there.sum()])


class Messages(Shared):
    """An `Encoder` that all properties share, and a linear head for each."""

    small = False

    def __init__(self, batch: int):
        super().__init__(batch)
        self._graph = nnx.graphdef(nnx.eval_shape(lambda: Encoder(nnx.Rngs(0))))

    @staticmethod
    def init_shared(keys, inputs):
        """See the base class."""
        del inputs
        return nnx.state(Encoder(nnx.Rngs(keys[0])))

    def encode(self, shared, batch):
        """See the base class."""
        return jax.vmap(nnx.merge(self._graph, shared))(batch.descriptors)
