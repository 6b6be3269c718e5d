"""A run's jobs: what is to be submitted, by which site's rules, what was, and how it stands in the queue.

`plan` is made before anything is submitted, `log` is written as it is, `status` reads both against the scheduler.
"""
