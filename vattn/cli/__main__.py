"""``python -m vattn.cli`` runs the command ``vattn``."""

import sys

from vattn.cli.command import main

sys.exit(main())
