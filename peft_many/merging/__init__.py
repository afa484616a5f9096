"""From a list of adapters to one: options, preparation, one group of layers after another, record.

What every merge passes through enters; rules for one layer are in `methods` and `algebra`, later changes in `editing`.
"""
