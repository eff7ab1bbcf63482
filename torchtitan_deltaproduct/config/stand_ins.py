"""Empty modules in the place of those that torchtitan imports for others' sake, while it is imported.

    with stand_ins():
        from torchtitan import train

Converters to float8, kernels of attention and Hugging Face datasets are nothing of ours, and load torch's compiler and
code generators, pyarrow and pandas: seconds, until a wrong TOML is told or a run begins.
Whoever imports them later gets the real ones.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

MODULES = {
    "torchtitan.components.quantization": (),
    "torchtitan.models.attention": ("VarlenMetadata",),
    "torchtitan.hf_datasets.text_datasets": ("build_text_validation_dataloader",),
}
"""Of torchtitan 0.2.2, and the names that its other modules import from them, to mention them in types or defaults."""


@contextmanager
def stand_ins() -> Iterator[None]:
    """Within it, `MODULES` that were not imported before are empty."""
    made = {name: ModuleType(name) for name in MODULES if name not in sys.modules}
    for name, module in made.items():
        vars(module).update({part: type(part, (), {}) for part in MODULES[name]})
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
