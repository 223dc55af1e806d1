"""The admin server, and what a running process shows of itself there."""
