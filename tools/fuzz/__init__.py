"""Mutated files of every kind that the project reads, and what must be true of each."""
