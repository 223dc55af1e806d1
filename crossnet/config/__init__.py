"""The configuration file: its sections, validation, and reloading."""
