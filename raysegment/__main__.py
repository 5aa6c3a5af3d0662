"""`python -m raysegment VERB` is `raysegment VERB`."""

import sys

from raysegment.cli import main

sys.exit(main())
