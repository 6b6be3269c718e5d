"""`vernier launch`: a run or a sweep handed to a backend, shown first with --dry-run.

It refuses what cannot go well before anything is written or submitted. What a backend needs is in
`launcher.backends`.
"""
