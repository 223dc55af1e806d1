"""DNS messages as bytes: questions, our own and upstream's replies, records, cookies. Sans-IO."""
