"""How each family of parity vectors is run on the project's modules: TOPICS maps a topic to a function Case -> outputs."""
