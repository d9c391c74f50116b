"""Methods that read gradients element by element, or store buffers of their size."""
