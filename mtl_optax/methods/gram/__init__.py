"""Methods that read the Gram matrix of the task gradients, `[T, T]`."""
