"""Every rewrite in the tests is proved, in processes that tests start too."""

from __future__ import annotations

import os

os.environ.setdefault("LORAFX_VALIDATE", "1")
