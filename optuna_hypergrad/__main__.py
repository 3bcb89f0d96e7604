"""``python -m optuna_hypergrad`` is the command ``optuna-hypergrad``."""

import sys

from .cli import main

sys.exit(main())
