"""A recipe's accuracy on all questions, estimated from its answers to a few of them."""
