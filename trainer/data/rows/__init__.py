"""Rows of files that have columns: JSONL, JSON, CSV, Parquet, Arrow and saved data sets; only `columns` is for others."""
