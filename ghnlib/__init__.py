"""ghnlib: graph hypernetworks that predict the parameters of unseen networks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ghnlib.config import GHNConfig
    from ghnlib.deepnets.dataset import DeepNets
    from ghnlib.graphs.graph import Graph
    from ghnlib.hypernetwork.ghn import GHN

__all__ = ["GHN", "DeepNets", "GHNConfig", "Graph"]
_HOMES = {"GHN": "hypernetwork.ghn", "DeepNets": "deepnets.dataset", "GHNConfig": "config", "Graph": "graphs.graph"}


def __getattr__(name: str) -> Any:
    """Public names are imported when used: what needs no torch does not wait for it (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ghnlib' has no attribute {name!r}")
    return getattr(import_module(f"ghnlib.{_HOMES[name]}"), name)
