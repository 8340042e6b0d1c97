"""python -m minprefix"""

import sys

from minprefix.cli import main

sys.exit(main())
