"""Moment matching distillation (Salimans et al., arXiv:2406.04103): a few-step student of a diffusion or flow teacher."""
