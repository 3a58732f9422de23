"""What is kept: studies in databases, evidence, and files that are whole or absent."""
