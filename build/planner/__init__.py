"""Fit and speed from arithmetic: no GPU, no weights, only config.json and data sheets."""
