"""Drop-in for the PyTorch part of cleverhans 4.0.0: put ``tsrfast.compat.`` before ``cleverhans.torch`` in the import lines.

==================================  ================================================================================================
Function, in a module of its name   Against the original, same seed
==================================  ================================================================================================
`fast_gradient_method`              norm=np.inf: same pixels; norm=2: equal up to rounding
`projected_gradient_descent`        same start; norm=np.inf: same pixels up to rounding; norm=2: as well, but where pixels meet the clip
                                    bounds (the original clips before it projects, too)
`carlini_wagner_l2`                 success and distances: the original carries Adam's averages and its iterate from one constant to
                                    the next, tsrfast begins each anew, as the attack's authors do
==================================  ================================================================================================

Arguments, defaults, errors (``ValueError``, ``AssertionError`` of sanity checks, ``NotImplementedError``) and random draws are the
original's: PyTorch's global generator; `y` None takes the model's predictions; no clipping unless both bounds are given. `model_fn` may
be a module or any function. Sanity checks come before the attack and say what is wrong; the original's come after it, without words.

Different on purpose:

- The result is detached; the original's still requires grad and holds the last graph.
- Gradients of parameters are not accumulated. A module is attacked in eval mode and gets every submodule's mode back; the original takes
  it as it is, and BatchNorm statistics change. (A function is called as it is.)
- An image's l2 step does not depend on its batch: the original divides the mean loss's gradient by at least 1e-6, so that images that
  the model is sure of hardly move.
- float64 images stay float64 (the original attacks in float32). A gradient that is NaN moves nothing.
- Images outside the clip bounds are an error also without sanity checks: the original returns images beyond eps for them.
- ``fast_gradient_method(norm=1)`` is not covered.

What is not here raises `NotCovered` (an ``ImportError``) when it is imported.
"""

from tsrfast.compat._covered import NotCovered as NotCovered

__version__ = "4.0.0"  # of cleverhans
