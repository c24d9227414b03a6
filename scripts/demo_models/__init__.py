"""Trains the demo's models from scratch, from data that is made here alone. README.md tells how."""
