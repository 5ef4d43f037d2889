"""Run text through a model: token windows, stretches of layers, losses."""
