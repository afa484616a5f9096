"""From a list of adapters to one: options, plan, one group of layers after another, record."""
