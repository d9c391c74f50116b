"""A multi-task recommender in small parts: data, network, training, metrics, report."""
