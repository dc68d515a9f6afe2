"""Triton's interpreter, mended where a newer numpy than it was written for breaks it.

Interpreted scalars are arrays of one element. numpy 2.4 and later don't convert those to ints, so that
`range` over anything computed in a kernel fails (triton 3.6).
"""

from __future__ import annotations

from typing import Any

import triton

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in the interpreter: TRITON_INTERPRET as it was when triton was imported."""


def _mend_scalars() -> None:
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if getattr(patch, "is_mended", False):
        return

    def patch_and_mend(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    patch_and_mend.is_mended = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch_and_mend


if IS_INTERPRETED:
    _mend_scalars()
