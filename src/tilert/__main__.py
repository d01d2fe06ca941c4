"""`python -m tilert` is the command line `tilert`."""

from __future__ import annotations

import sys

from tilert.serve.cli import main

sys.exit(main())
