"""Sequence parallelism on torch.distributed: a module a paper, named by its slug in the catalog."""
