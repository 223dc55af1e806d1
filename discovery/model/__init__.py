"""What discovery is about: names, addresses, records and the mesh that they make. Sans-IO."""
