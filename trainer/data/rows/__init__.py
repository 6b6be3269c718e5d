"""Rows of JSONL, JSON, CSV, Parquet and Arrow files and of saved data sets, and what a row's columns make.

`columns` is for others, and `fields` says what is wanted of a row.
"""
