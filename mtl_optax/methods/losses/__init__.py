"""Methods that read only the losses, or nothing, and so need only one backward pass."""
