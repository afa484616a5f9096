"""Where adapters come from and go to: folders, Hub repositories, checkpoints of the LLaVA repository; base models."""
