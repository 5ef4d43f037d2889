"""Quality of a model: perplexity, questions, comparisons, replies."""
