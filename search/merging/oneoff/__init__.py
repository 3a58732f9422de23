"""One merge, made as it is asked for, without a study: `mergefront merge`."""
