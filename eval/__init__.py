"""The evaluations as commands, from the repository root: `python -m eval.<name> MODEL [MODEL ...]`.

The code is in `torchtitan_deltaproduct/evaluation/`; importing `eval` imports nothing.
"""

import torchtitan_deltaproduct  # noqa: F401  (for `begin_command`)
