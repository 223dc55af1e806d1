"""What every stream has, whatever carries it: a reason for its end, and its line in the log."""
