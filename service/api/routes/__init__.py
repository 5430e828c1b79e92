"""The HTTP routes: thin, one module per group of paths."""
