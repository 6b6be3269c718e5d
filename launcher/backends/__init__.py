"""Who starts ranks: torch's agent here, mpirun, ssh, Slurm, SkyPilot; each turns a plan into processes or a job.

A backend starts and ends ranks and no more; it decides nothing about a run. `process` has what all of them share.
"""
