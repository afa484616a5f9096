"""Other people's formats: adapters and merges as servers and programs read them that do not merge.

Each export enters with a file of its own: it reads one adapter, writes one folder whole or not at all, and says in its
card what it cannot do. What it writes loads without this package, but for a routed model, which needs it to route.
"""

from .export import Export
from .lora import export_lora
from .model import export_model
from .routed import export_routed_model, load_routed_model

__all__ = ["Export", "export_lora", "export_model", "export_routed_model", "load_routed_model"]
