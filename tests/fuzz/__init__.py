"""Inputs that nobody thought of: every target is a function that must hold for whatever its strategy draws.

pytest tests/fuzz                                  a few of each
python -m tests.fuzz --examples 100000             many, with their counts
"""
