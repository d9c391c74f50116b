"""What all studies share: data, steps, training, the runner, reports and the command line."""
