"""Methods that read the norms of the task gradients."""
