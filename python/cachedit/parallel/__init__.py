"""Inference on several devices."""
