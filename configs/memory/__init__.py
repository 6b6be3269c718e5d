"""Models of memory and of a step's time: arithmetic on sizes, without torch.

`vernier plan` and the placement of scoring ask them. Nothing is built or measured here; benchmarks/plan_memory.py holds
them against what ranks take.
"""
