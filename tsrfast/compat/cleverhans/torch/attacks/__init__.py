"""As ``cleverhans.torch.attacks``: a module for each attack."""

HAS = ("fast_gradient_method", "projected_gradient_descent", "carlini_wagner_l2")
