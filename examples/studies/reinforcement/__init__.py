"""PPO on tasks written in JAX: what balancing the actor and the critic is worth."""
