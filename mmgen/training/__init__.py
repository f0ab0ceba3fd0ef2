"""The one training loop and its parts: accelerate, EMA, resuming, previews, logs. README.md describes runs and their files."""
