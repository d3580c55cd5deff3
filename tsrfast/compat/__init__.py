"""Drop-ins for other attack libraries: the same names, arguments, defaults and conventions; `tsrfast.attacks` does the work.

Change the import line and keep the code: ``import tsrfast.compat.torchattacks as torchattacks``. The libraries themselves are not needed.
"""
