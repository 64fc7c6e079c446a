"""Linear-time mixing: a module a paper, named by its slug in the catalog."""
