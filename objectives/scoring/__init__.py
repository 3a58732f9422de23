"""Log-likelihoods of answer options, with every token computed once."""
