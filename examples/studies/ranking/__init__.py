"""Trains tabular multi-task models on example-wise labels: a click, a conversion, a watch time."""
