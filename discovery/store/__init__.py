"""Where records live: memory and SQLite, behind one interface and one contract test."""
