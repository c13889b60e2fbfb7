"""``python -m lorafx_cli``: as the console script ``lorafx``, where that is not installed."""

import sys

from lorafx_cli import main

sys.exit(main())
