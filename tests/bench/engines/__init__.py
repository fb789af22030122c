"""Engines that run language models on a CPU, each in an environment of its own."""
