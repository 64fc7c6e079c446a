"""Vision-language: a module a paper, named by its slug in the catalog."""
