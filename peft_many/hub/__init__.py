"""Where adapters come from and go to: folders, Hub repositories, checkpoints of the LLaVA repository; base models.

What finds, downloads, loads or uploads one of these enters; nothing is measured or merged here.
"""
