"""Whether nodes are fit: the check at a job's start (`python -m launcher.preflight`), and `vernier doctor` here.

`node` and `gpu` measure, `channel` brings the nodes together, `judge` decides who is unfit. Nothing of a run is changed
but its report.
"""
