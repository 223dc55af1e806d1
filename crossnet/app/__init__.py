"""The roles of one process: started from a configuration, changed, drained and handed over."""
