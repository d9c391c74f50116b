"""Exact solvers on tiny arrays, [T] and [T, T]: the mathematics that the methods share.

Every function is pure, runs on the device, and can be jitted and vmapped. An inactive task gets weight
exactly 0, whatever its slot holds. Finite input gives finite output.
"""
