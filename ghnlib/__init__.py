"""ghnlib: graph hypernetworks that predict the parameters of unseen networks."""

from ghnlib.deepnets import DeepNets
from ghnlib.graph import Graph
from ghnlib.hypernetwork import GHN, GHNConfig

__all__ = ["GHN", "DeepNets", "GHNConfig", "Graph"]
