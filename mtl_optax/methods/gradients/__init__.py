"""Methods that work on gradients element by element, or keep buffers of their size."""
