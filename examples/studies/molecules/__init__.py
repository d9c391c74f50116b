"""Eleven properties of the molecules of QM9 from one network: how many runs does balancing replace?"""
