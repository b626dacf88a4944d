"""A tower's output, computed on the workers: a model's callable part, what it is called with, and Beam's RunInference.

TensorFlow is imported here alone, and only once a tower is computed.
"""
