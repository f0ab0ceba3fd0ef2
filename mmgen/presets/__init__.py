"""Recipes, one TOML file each. Every field can be set from the command line: --set section.name=value."""
