"""Exports of adapters and merges, for servers and programs that cannot route projectors or know nothing of PEFT."""

from .lora import export_lora
from .model import export_model
from .result import Export
from .routed import export_routed_model, load_routed_model

__all__ = ["Export", "export_lora", "export_model", "export_routed_model", "load_routed_model"]
