"""The configuration file: its sections, how it is checked, and how a changed one is applied."""
