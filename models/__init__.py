"""What a model is: the torch networks, and the bundles that are served."""
