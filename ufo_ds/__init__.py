"""Unified vision models: one Task-MoE vision transformer for many tasks, and the dense models cut from it."""

__version__ = "0.1.0"
