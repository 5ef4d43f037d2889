"""Containers: the architectures of llama.cpp that a model can be written as."""
