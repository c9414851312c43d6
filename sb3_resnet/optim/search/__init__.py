"""Hyperparameter search with RL-Zoo's ``-optimize``: what is searched, and how it gets into a section of its YAML."""
