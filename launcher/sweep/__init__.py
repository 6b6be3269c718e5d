"""A sweep: one training with other settings and seeds, as members that share data and reference set.

`members` makes them, `store` keeps them, `table` tells what came of them. Starting them is `launcher.launch`'s.
"""
