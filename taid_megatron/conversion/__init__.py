"""Weights between Hugging Face folders and Megatron's parameters.

Read families.py (the tables) and segments.py (from a parameter to parts of tensors) first.
"""
