"""The study of the MetaBalance paper: its data, its baselines, its tables and its figures."""
