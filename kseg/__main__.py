"""`python -m kseg` is the command `kseg`."""

import sys

from kseg.cli import main

sys.exit(main())
