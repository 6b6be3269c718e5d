"""YAML as people mean it: scalars that keep their text, keys given once, overrides typed as `key=value`.

Only `configs.load` turns them into settings. Nothing here knows which settings there are.
"""
