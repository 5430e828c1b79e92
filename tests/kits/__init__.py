"""Kits that tests share: stacks and scenes, series, clients, jobs."""
