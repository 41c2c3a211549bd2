"""Benchmarks: what is measured is a record first, and a table or plot afterwards."""
