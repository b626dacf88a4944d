"""Readers of model artifacts: which towers, which ids in which rows, where the bytes are. No Beam, no TensorFlow."""
