"""``python -m vattn`` is the command ``vattn``."""

import sys

from vattn.cli import main

sys.exit(main())
