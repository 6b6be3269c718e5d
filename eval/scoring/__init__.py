"""Per-sample losses of a model on a reference set: losses, placement of the model, journal, and the evaluator.

`evaluator` follows a run, `once` scores what `vernier eval` names, and the trainer scores inline by the same `score`.
Only `eval.tables` writes what comes out.
"""
