"""Loops that people write around an optimizer, each played by several tests."""
