"""Measurements of the library: time, memory and what a TPU would be given to do."""
