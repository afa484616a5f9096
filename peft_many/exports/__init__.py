"""Other people's formats: adapters and merges for servers and programs that know nothing of this package.

Each export reads one adapter, writes one folder whole or not at all, and says in its card what it cannot do.
"""

from .export import Export
from .lora import export_lora
from .model import export_model
from .routed import export_routed_model, load_routed_model

__all__ = ["Export", "export_lora", "export_model", "export_routed_model", "load_routed_model"]
