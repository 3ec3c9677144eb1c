"""`python -m clipworks` is the command `clipworks`."""

import sys

from .cli.main import main

sys.exit(main())
