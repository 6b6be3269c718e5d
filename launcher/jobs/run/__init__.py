"""A job from the inside: `python -m launcher.jobs.run RUN COMPONENT`, the last line of every job script.

`supervisor` holds the job together, `begin` and `after` decide what the run's files decide, `steps` says what srun
starts. Nothing outside of a job imports this room.
"""
