"""A pytest plugin: Triton's interpreter without two things that take much of its time and change nothing.

It (3.6 to 3.9) patches all of `triton.language` at every call of a device function, although the launch around it has
done so; and it computes whether integers overflow, to assert it in its debug mode alone, which is off.
"""

from dataclasses import replace

import triton.language as tl
from triton.runtime import interpreter

patch_lang = interpreter._patch_lang
patched: set[str] = set()


def patch_lang_once(fn):
    """As Triton's own, unless the modules that `fn` sees are patched already."""
    seen = {module.__name__ for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())}
    if seen and seen <= patched:
        return None
    scope = patch_lang(fn)
    patched.update(seen)
    if (restore := getattr(scope, "restore", None)) is not None:
        scope.restore = lambda: (patched.clear(), restore())
    return scope


interpreter._patch_lang = patch_lang_once
interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
