"""How each family of parity vectors is run on the project's modules.

``TOPICS`` of a family's file maps a topic to a function Case -> outputs by name.
"""
