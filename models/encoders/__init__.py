"""Encoders: a modality in, embeddings at its tokens out. One file each, for `models/omni.py` and the families."""
