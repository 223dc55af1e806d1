"""Files that people and tools replace at run time: YAML files, TLS files, and the detection of changes."""
