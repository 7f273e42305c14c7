"""Arithmetic over weights as they lie in memory, each kernel beside a plain form."""
