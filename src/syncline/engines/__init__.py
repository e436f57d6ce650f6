"""Inference engines: the client every other room speaks through, and one folder for each engine served."""
