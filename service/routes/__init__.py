"""The HTTP routes: thin, one module a group of paths."""
