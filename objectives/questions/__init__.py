"""Questions: read, put into the texts that a model reads, dealt out to two splits."""
