"""Models as ART sees them."""

from tsrfast.compat.art.estimators import classification

__all__ = ["classification"]
