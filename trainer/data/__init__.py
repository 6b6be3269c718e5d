"""Data preparation: documents become tokens, and these training shards and a reference set.

`prepare` makes a data set from a config; `shards.Windows` is what training reads of it.
"""
