"""Checkpoint files of other projects, read and written without running anything in them. See README.md."""
