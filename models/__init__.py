"""Models: the torch networks, the model card, and the registry of bundles."""
