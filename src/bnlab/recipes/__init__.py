"""The recipes bnlab ships, as YAML; `bnlab.config` reads them."""
