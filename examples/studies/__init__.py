"""The tables of the papers, the comparison and the benchmarks, declared on one harness."""
