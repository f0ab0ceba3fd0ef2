"""Formulas of the diffusion process: schedules, transitions, coefficients. No networks."""
