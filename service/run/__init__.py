"""Compose read, infer, learn and write: request → plan → run → result."""
