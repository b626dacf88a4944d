"""A tower's output, computed on the workers: a model's callable part, what it is called with, and Beam's RunInference.

TensorFlow is imported here alone, and only once a tower is computed.
"""

from __future__ import annotations

import re


def is_query(features: str) -> bool:
    """Returns whether features come from a query; else from files."""
    return re.match(r"\(*\s*(SELECT|WITH)\b", features, re.IGNORECASE) is not None
