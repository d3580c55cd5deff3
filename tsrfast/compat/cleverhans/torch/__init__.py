"""As ``cleverhans.torch``."""
