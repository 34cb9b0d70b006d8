"""``python -m vattn`` is the command ``vattn``."""

import sys

from vattn.cli.command import main

sys.exit(main())
