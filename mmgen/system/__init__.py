"""The machine: processes, locks, atomic files, random numbers that depend on a key."""
