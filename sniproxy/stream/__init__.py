"""The stream protocol between relay and gateway: preamble, capsules, end rules. Shared with turnreg."""
