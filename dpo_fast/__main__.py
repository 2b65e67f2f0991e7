"""`python -m dpo_fast`."""

import sys

from dpo_fast.cli import main

sys.exit(main())
