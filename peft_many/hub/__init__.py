"""Where adapters come from and go to: folders and Hub repositories."""
