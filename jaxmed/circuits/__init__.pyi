from .choice import node_scores, top_edges, top_nodes
from .curve import Areas, areas
from .formats import Scored, read_scores, write_scores
from .graph import Graph, connected, graph_of
from .run import outcomes

__all__ = [
    "Areas",
    "Graph",
    "Scored",
    "areas",
    "connected",
    "graph_of",
    "node_scores",
    "outcomes",
    "read_scores",
    "top_edges",
    "top_nodes",
    "write_scores",
]
