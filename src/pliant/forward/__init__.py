"""Run text through a model: windows of tokens, stretches of layers, losses."""
