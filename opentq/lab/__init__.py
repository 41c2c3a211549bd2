"""The lab: sweeps that survive a kill, and a record of what was expected, found, and found again."""
