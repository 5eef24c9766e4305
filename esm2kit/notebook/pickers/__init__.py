"""Widgets that choose the parameters of a notebook."""
