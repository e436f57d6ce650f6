"""Environments and rewards written for the libraries of the field, as they are."""
