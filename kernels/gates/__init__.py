"""The three gates that check a kernel without a GPU."""
