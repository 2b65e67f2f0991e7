"""Preference losses: their options, the losses that couple a batch, and how every level computes them."""
