"""``python -m tsrfast``: the same as the command ``tsrfast``."""

from tsrfast.cli import main

main()
