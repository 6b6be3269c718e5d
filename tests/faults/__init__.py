"""Trainings that are killed at random, by hand of `make torture` and, a few of them, with every run of the tests."""
