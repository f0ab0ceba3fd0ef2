"""Settings: from a preset, a TOML file and single values to one checked, frozen data class. Reads no data and no model file."""
