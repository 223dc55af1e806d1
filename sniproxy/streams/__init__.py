"""What all streams have in common, whatever carries them: a reason for the end, and a log line."""
