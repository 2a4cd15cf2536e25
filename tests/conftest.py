"""Set before torch and triton are imported: what keeps the suite's processor time low on every machine."""

import inspect
import os

import pytest

# pytest-xdist runs a process a core: more threads would only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch.compile would start a pool of compiling processes, each of which imports torch
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


class _Patched:
    """Stands for a patch that is there already and is taken back by who made it."""

    def restore(self):
        pass


@pytest.fixture(autouse=True, scope="session")
def language_patched_once():
    """Triton's interpreter patches its language anew at every call of a device function, almost half of the time.

    A patch of the module that a kernel sees serves the device functions it calls; what such a call patches beside it
    is never taken back, and so serves all later ones.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    language = interpreter.tl
    patch_language = interpreter._patch_lang
    seen, kept, active = {}, set(), []

    def patch_once(function):
        if function not in seen:
            modules = {"tl": language, "core": language.core}
            values = [value for value in function.__globals__.values() if inspect.ismodule(value)]
            seen[function] = {name for name, module in modules.items() if any(value is module for value in values)}
        if active:
            if seen[function] - kept - active[-1]:
                patch_language(function)
                kept.update(seen[function] - active[-1])
            return _Patched()
        scope = patch_language(function)
        restore = scope.restore

        def leave():
            active.pop()
            restore()

        active.append(seen[function])
        scope.restore = leave
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        yield
