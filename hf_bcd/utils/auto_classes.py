"""Makes `import hf_bcd` enough for the Auto classes to know our models, without importing transformers itself."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


# the module that holds the Auto classes; `pipeline` and every AutoModel import it
AUTO_MODULE = "transformers.models.auto.modeling_auto"


def register_models() -> None:
    """Registers our models with the Auto classes now, or as soon as something imports these."""
    if AUTO_MODULE in sys.modules:
        import_module("hf_bcd.models")
    else:
        sys.meta_path.insert(0, _AutoClassFinder())


class _AutoClassFinder(MetaPathFinder):
    """Finds `AUTO_MODULE` as usual, once, and adds our models after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module("hf_bcd.models")

            spec.loader.exec_module = execute_and_register
        return spec
