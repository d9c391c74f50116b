"""What no user imports: the method type, its lift, the task tree, the Gram matrix, and the checks."""
