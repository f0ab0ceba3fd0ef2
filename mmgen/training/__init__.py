"""The one training loop and its parts: accelerate, EMA, resuming, previews, logs."""
