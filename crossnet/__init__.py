"""The command line, configuration, roles in one process, admin server, lab, status."""
