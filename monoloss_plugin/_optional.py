"""Optional dependencies: an import that fails names the extra to install."""

from __future__ import annotations


def missing_extra(error: ModuleNotFoundError, extra: str) -> ModuleNotFoundError:
    """Return an error that says which extra of this package brings the missing module.

    Where the library is there but fails by itself (its error names no module), that is said.
    """
    if error.name is None:
        return ModuleNotFoundError(f"cannot be imported as it is installed: {error}")
    return ModuleNotFoundError(
        f"needs {error.name}, which is not installed: pip install 'monoloss_plugin[{extra}]'",
        name=error.name,
    )
