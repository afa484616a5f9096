"""An adapter's folder: read and checked tensor by tensor, and written whole or not at all. No model is needed here."""
