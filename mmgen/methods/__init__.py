"""The training methods, one file or folder each: IMM, the many-step teacher, moment matching distillation."""
