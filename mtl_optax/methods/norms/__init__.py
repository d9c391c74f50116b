"""Methods that look at the norms of the task gradients."""
