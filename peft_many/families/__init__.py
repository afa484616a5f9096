"""Where a model keeps its parts, and how its images lie in a tensor. What structure does not tell is registered here.

`register_family` and `register_image_layout` are for everyone: what peft_many knows of the families of transformers
goes through them too. Only descriptions enter this room; nothing here watches a model or changes it.
"""

from . import known as known
from .family import Family, Tiles, register_family
from .image_layouts import register_image_layout
from .image_rows import ImageRows
from .projector_call import ProjectorCall

__all__ = ["Family", "ImageRows", "ProjectorCall", "Tiles", "register_family", "register_image_layout"]
