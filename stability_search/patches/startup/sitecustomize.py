"""Puts the patches into a Python process once it imports torch; others pay next to nothing.

`stability-search instrument` puts this folder first on PYTHONPATH, so it acts in every Python
process of the command, those of launchers and spawned workers included. A `sitecustomize` that
stands behind it runs as if it were alone.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_FOLDER = Path(__file__).resolve().parent


class _TorchFinder(MetaPathFinder):
    """Waits for torch."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find torch as Python would, and patch it once it is loaded."""
        del path, target
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)
        return spec


class _PatchingLoader(Loader):
    """Loads torch with its own loader, then patches it.

    Args:
        loader: Torch's own.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as its own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module as its own loader does, which is its loader again from then on."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _install()


def _install() -> None:
    try:
        from stability_search.patches import install
    except ImportError as error:
        sys.stderr.write(
            f"WARNING nothing is patched: {sys.executable} has no stability-search ({error}). "
            "Install it into the environment that trains.\n"
        )
        return
    install(is_quiet=True)


def _run_the_next() -> None:
    """Run the `sitecustomize` that this one hides."""
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _FOLDER]
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if __name__ == "sitecustomize":  # as anything else it is only read
    sys.meta_path.insert(0, _TorchFinder())
    _run_the_next()
