"""The families of transformers whose structure does not tell everything."""

from __future__ import annotations

from .family import Family, Tiles, register_family

# Beside the projector of the vision tower they have one for audio, or one for images that they make.
register_family("gemma3n", Family(projectors=("embed_vision",)))
register_family("gemma4", Family(projectors=("embed_vision",)))
register_family("gemma4_unified", Family(projectors=("embed_vision",)))
register_family("janus", Family(projectors=("model.aligner",)))

# Of two projectors in a row the second one is routed, which is next to the language model.
register_family("muse_glimmer", Family(projectors=("vision_projection",)))
register_family("muse_spark", Family(projectors=("vision_projection",)))

# Its projector is a `PreTrainedModel`, as vision towers are.
register_family("molmo2", Family(projectors=("multi_modal_projector",)))

# The language model holds the vision tower too.
register_family("git", Family(projectors=("git.visual_projection",), language_model="git.encoder"))
register_family("idefics", Family(projectors=("perceiver_resampler",), language_model="model.layers"))
register_family("phi4_multimodal", Family(projectors=("img_projection_down",), language_model="model.layers"))

# A Q-Former reads the tower, in InstructBLIP together with the instruction, and the projector reads its queries.
register_family("blip-2", Family(routes_by_tower=True))
register_family("instructblip", Family(routes_by_tower=True))
register_family("instructblipvideo", Family(routes_by_tower=True))

register_family("hunyuan_vl", Family(one_image_per_call=True))

# All tiles of an image are one run of placeholder tokens.
register_family("aria", Family(tiles=Tiles(0)))
register_family("internvl", Family(tiles=Tiles(0)))
register_family("internvl_chat", Family(tiles=Tiles(0)))
register_family("perception_lm", Family(tiles=Tiles(0)))
register_family("qianfan_ocr", Family(tiles=Tiles(0)))
register_family("got_ocr2", Family(tiles=Tiles(0)))
# Each token is a tile, and the last layer of the tower is what projects.
register_family("inkling_mm_model", Family(projectors=("vision_tower.encoder_layers.-1",), tiles=Tiles(0)))

# A token stands between tiles.
register_family("aya_vision", Family(tiles=Tiles(1)))
register_family("cohere2_vision", Family(tiles=Tiles(1)))
register_family("ovis2", Family(tiles=Tiles(1)))
# The same one stands between images, but an image is cut into four tiles and the whole, or not at all.
register_family("idefics2", Family(tiles=Tiles(1, number=5)))

# Several tokens stand between tiles, in some families line breaks too.
register_family("llama4", Family(tiles=Tiles(2)))
register_family("granite_docling", Family(tiles=Tiles(4)))
register_family("idefics3", Family(tiles=Tiles(4)))
register_family("smolvlm", Family(tiles=Tiles(4)))
for _minicpm in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"):
    register_family(_minicpm, Family(tiles=Tiles(3, own_opener=True), frames=Tiles(3)))
