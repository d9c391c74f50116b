"""EMTL's experiments (Yuan and Zhang, 2023): `python -m examples.studies.emtl COMMAND`."""
