"""Part 0: the ideas that every other family stands on."""
