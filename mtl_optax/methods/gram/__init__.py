"""Methods that look at the inner products of the task gradients: a `[T, T]` problem."""
