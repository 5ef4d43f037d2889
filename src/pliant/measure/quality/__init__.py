"""How good a model is: perplexity, questions, comparisons, replies."""
