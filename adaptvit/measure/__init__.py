"""Accuracy and cost of a model on a data set, and speed in turns."""
