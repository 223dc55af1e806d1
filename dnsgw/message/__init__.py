"""DNS messages as bytes: questions, replies of ours and of upstream, records, cookies. Sans-IO."""
