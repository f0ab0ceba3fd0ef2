"""Metrics: feature statistics, the Fréchet distance, and other comparisons of two sets of images. See README.md."""
