"""Small ReLU networks compiled for native code: `compile` makes a `Chain` of a module, or says why it cannot."""

from tsrfast.chain.chain import Chain, automatic, compile, logits

__all__ = ["Chain", "automatic", "compile", "logits"]
