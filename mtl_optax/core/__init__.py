"""What no user imports: the method type, the pipeline, the task tree, the Gram matrix, and the checks."""
