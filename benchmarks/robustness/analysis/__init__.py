"""Comparisons of trained networks, one question per module."""
