"""``python -m vattn.cli`` is the command ``vattn``."""

import sys

from vattn.cli.command import main

sys.exit(main())
