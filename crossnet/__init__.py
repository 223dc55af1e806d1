"""The front door: command line, configuration, running roles in one process, admin server, lab, status."""
