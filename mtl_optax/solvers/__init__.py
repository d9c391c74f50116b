"""Exact solvers on small arrays, `[T]` and `[T, T]`: the mathematics of the methods.

Every function is pure, runs on the device, and can be jitted and vmapped. The weight of an inactive task
is exactly 0, for any values in its entries. Finite inputs give finite outputs.
"""
