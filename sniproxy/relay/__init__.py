"""The relay: accepts clients, reads the name that they ask for, and carries each stream where it leads."""
