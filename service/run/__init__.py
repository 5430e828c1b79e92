"""Compose read, infer and write: request → plan → run → result."""
