"""Multi-task models in Flax NNX, one file each, to copy and change."""
