"""Mini-UCIT: a small, honest benchmark of multimodal continual instruction tuning, drawn from seeds."""
