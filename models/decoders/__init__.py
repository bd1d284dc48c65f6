"""Decoders: hidden states at their tokens in, a loss (and a stream for other decoders) out. One file each."""
