"""Training objectives, one a file. They know networks and schedules, never a data set."""
