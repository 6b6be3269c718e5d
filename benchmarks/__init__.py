"""Benchmarks: Vernier beside its peers, in one run each, as ratios. `make bench` runs those for CPUs."""
