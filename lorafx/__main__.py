"""``python -m lorafx``: the command line."""

import sys

from lorafx_cli import main

sys.exit(main())
