"""`vernier compare`: what was asked, and how verdicts stand for people.

`command` chooses, `eval.compare` computes, `report` words it. Nothing is decided here that JSON would not say too.
"""
