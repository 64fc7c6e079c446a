"""The small language models that labs stand on, how they are trained, and the shipped ones."""
