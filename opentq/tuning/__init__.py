"""Tuning: the smallest cache for one model under a bound on quality, found by measuring."""
