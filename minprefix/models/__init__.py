"""GPT-2 and BART with the prefix as an argument of attention, their tokenizer and their weights.
May import kernels."""
