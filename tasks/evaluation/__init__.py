"""Evaluation: perplexity, and what can be counted (size, bits per weight, sparsity)."""
