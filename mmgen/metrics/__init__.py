"""Figures of merit: feature statistics, the Fréchet distance, and what else compares two sets of images."""
