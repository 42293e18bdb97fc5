"""Weakly supervised 3D MR segmentation with conditional diffusion models (Hu et al., MICCAI 2023)."""

import sys
from pathlib import Path

__version__ = "0.8.0"


def require_version(version: str) -> None:
    """Refuses to build a bundle of one version from the code of another; the first thing that `network_def` asks for.

    Each packed bundle carries its own `custom_modules`, but a process imports a package once: a server of two bundles
    would run both on the code of the first.

    Args:
        version: of the bundle, which its config states.

    Raises:
        ValueError: if this package is of another version; the message has both versions and their folders.
    """
    if version == __version__:
        return
    own = Path(__file__).resolve().parent
    folders = (Path(folder, own.name).resolve() for folder in sys.path)
    others = sorted({str(folder) for folder in folders if folder != own and (folder / "__init__.py").is_file()})
    raise ValueError(
        f"This bundle is of version {version}, but Python has imported {own.name} {__version__} from {own}"
        f"{' and not ' + ' or '.join(others) if others else ''}. A process serves bundles of one version: pack them "
        f"again from one version, or start a process for each, from a folder without {own.name} of its own."
    )
