"""From a list of adapters to one: options, preparation, one group of layers after another, record."""
