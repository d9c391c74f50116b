"""Methods that read only the losses, or nothing: one backward pass is enough."""
