"""MultiBalance's experiments (He et al., 2024, section 5) on data of your own."""
